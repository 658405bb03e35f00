"""Evaluate a target on tasks of the lm-evaluation-harness, unsteered and steered."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from expertsteer.errors import DataError, ModelError, ParameterError
from expertsteer.evaluation.damage import Damage, measure_damage
from expertsteer.evaluation.measurements import (
    Measurement,
    measure_means,
    measure_statistics,
    measure_strata,
)
from expertsteer.evaluation.row_file import SharedRows, claim_folder
from expertsteer.evaluation.run import describe_run, steering_by_strength
from expertsteer.files import write_text
from expertsteer.locks import locked
from expertsteer.models import LanguageModel
from expertsteer.models.cache import require_disk
from expertsteer.pack import SteeringPack
from expertsteer.processes import is_main_process, share
from expertsteer.provenance import describe_machine

__all__ = ["HarnessEvaluation", "TaskEvaluation", "evaluate_harness_tasks"]

# The harness resamples these fewer times as well: each value takes long to compute.
_SLOW_METRICS = {"bleu", "chrf", "chrf++", "ter"}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

# The rows of one task at one strength, by name.
_Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TaskEvaluation:
    """What a target answers in one task, or a group of them, at every strength.

    Attributes
    ----------
    measurements : dict of float to dict of str to Measurement
        By strength (0 is unsteered) and the harness's metric, followed by a comma and the
        filter where the task names one: "acc", "exact_match,strict-match". For a metric
        that the harness does not average over items (a perplexity, F1), ``mean`` is what
        it computes of them all.
    n_questions : int
    n_cut : int
        Items whose prompt lost its beginning because it did not fit the context.
    """

    measurements: dict[float, dict[str, Measurement]]
    n_questions: int
    n_cut: int


@dataclass(frozen=True)
class HarnessEvaluation(Damage):
    """What a target answers in tasks of the harness, and what steering costs.

    Attributes
    ----------
    tasks : dict of str to TaskEvaluation
        By task, then by group where the harness has a metric for the group.
    provenance : dict
    perplexity, divergence, n_plain_texts, n_plain_cut
        As in `Damage`.
    """

    tasks: dict[str, TaskEvaluation]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON types."""
        return asdict(self)


def evaluate_harness_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    output: str | Path,
    *,
    pack: SteeringPack | None = None,
    strengths: Sequence[float] = (),
    positions: str = "all",
    n_shots: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    plain_text: Sequence[str] = (),
    force: bool = False,
) -> HarnessEvaluation:
    """Evaluate a target on tasks of the lm-evaluation-harness, unsteered and steered.

    The harness's own ``simple_evaluate`` runs every task at every strength, on
    `SteeredHarnessModel`.

    Parameters
    ----------
    model : LanguageModel
    tasks : sequence of str
        Names of tasks, groups or tags, or patterns such as "arc_*".
    output : str or Path
        A folder: ``rows.jsonl`` (a row an item and strength), ``tasks.jsonl`` (a row a
        finished task and strength), ``plain.jsonl``, ``run.json``, ``summary.json``. A
        folder of the same run is continued: a task is run again at a strength unless it
        was finished there.
    pack, strengths, positions, plain_text, force
        As in `evaluate`.
    n_shots : int, optional
        Solved examples before each item; default: the task's own.
    limit : int, optional
        Most items of a task, the first ones.
    chat_template : bool, default=False
        Put prompts into the model's chat template, solved examples as turns.
    include_path : str or Path, optional
        A folder of task files; they go before the harness's own of the same name.
    batch_size : int, default=8
        Prompts to generate from at once.

    Returns
    -------
    HarnessEvaluation

    Raises
    ------
    ParameterError
        On an unknown task, or one that runs code of the model's or needs images.
    DataError
        If the harness is not installed or cannot load or run a task, or the folder holds
        another run.
    ModelError
        If the model has no chat template and is asked for one.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            f"Got the task {tasks[0]!r} of the lm-evaluation-harness, but expected the package "
            'lm_eval to be installed. Install it with: pip install "expertsteer[eval]"'
        )
    if chat_template and model.tokenizer.chat_template is None:
        raise ModelError(
            f"Got a chat template asked of {model.name}, which has none. Leave it off."
        )
    folder = Path(output)
    steerings = steering_by_strength(model, pack, strengths, positions, force=force)
    manager, loaded, groups = _load(tasks, include_path)
    about = {
        "kind": "lm-eval",
        "lm_eval": version("lm_eval"),
        "tasks": {name: _fingerprint(task, limit) for name, task in loaded.items()},
        "n_shots": n_shots,
        "limit": limit,
        "chat_template": chat_template,
    }
    provenance = describe_run(model, pack, about, positions, plain_text)
    require_disk(folder, 0, "rows")
    with locked(folder, "evaluation"):
        claim_folder(folder, provenance)
        units = list(itertools.product(steerings, loaded))
        places = {unit: place for place, unit in enumerate(units)}

        def place(row: dict[str, Any]) -> int:
            return places.get((row["strength"], row["task"]), len(places))

        with SharedRows(folder / "tasks.jsonl") as finished:
            done = {(row["strength"], row["task"]) for row in finished.rows}
            # Those of tasks that a kill cut short go.
            with SharedRows(
                folder / "rows.jsonl", keep=lambda row: (row["strength"], row["task"]) in done
            ) as file:
                for strength, name in share([unit for unit in units if unit not in done]):
                    steered: dict[str, Any] = {}
                    if strength:
                        steered = {"pack": pack, "strength": strength}
                        steered |= {"positions": positions, "force": force}
                    new, shots = _run(
                        model,
                        loaded[name],
                        manager,
                        steered,
                        num_fewshot=n_shots,
                        limit=limit,
                        apply_chat_template=chat_template,
                        batch_size=batch_size,
                    )
                    file.add({"strength": strength, "task": name} | row for row in new)
                    finished.add([{"strength": strength, "task": name, "n_shots": shots}])
                rows = file.gather(place, "the tasks")
            finished.gather(place, "the tasks")
        damage = measure_damage(model, plain_text, steerings, folder / "plain.jsonl")
        found: dict[str, dict[float, _Rows]] = {
            name: {strength: {} for strength in steerings} for name in loaded
        }
        for row in rows:
            if (row["strength"], row["task"]) in places:
                found[row["task"]][row["strength"]][row["name"]] = row
        result = _evaluation(loaded, groups, found, damage, provenance)
        if is_main_process():
            write_text(folder / "summary.json", json.dumps(result.to_dict(), indent=2))
    return result


def _evaluation(
    loaded: dict[str, Any],
    groups: dict[str, Any],
    found: dict[str, dict[float, _Rows]],
    damage: Damage,
    provenance: dict[str, Any],
) -> HarnessEvaluation:
    evaluated = {name: _summary(task, found[name]) for name, task in loaded.items()}
    for name, group in groups.items():
        summary = _group_summary(group, loaded, found)
        if summary is not None:
            evaluated[name] = summary
    return HarnessEvaluation(
        **vars(damage),
        tasks=evaluated,
        provenance=provenance | {"machine": describe_machine()},
    )


def _load(
    names: Sequence[str], include_path: str | Path | None
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the harness's task manager, the tasks by name and the groups by name."""
    from lm_eval.tasks import TaskManager

    own = str(include_path) if include_path is not None else None
    if own is not None and not Path(own).is_dir():
        raise ParameterError(f"Got the folder {own} of task files, but there is no such folder.")
    manager = None
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
    # Reading the harness's thousands of task files takes seconds.
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=own)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, manager.all_tasks, 5)
            raise ParameterError(
                f"Got the task {name!r}, which the lm-evaluation-harness does not know. "
                + (f"Closest: {', '.join(close)}." if close else "`lm-eval ls tasks` lists them.")
            )
        for one in matching:
            try:
                loaded = manager.load([one])
            # Data sets come from anywhere, and fail in any way.
            except Exception as error:
                raise DataError(f"Cannot load the task {one!r}: {_reason(error)}") from error
            for task_name, task in loaded["tasks"].items():
                _check_runnable(task_name, task)
                tasks.setdefault(task_name, task)
            groups |= loaded.get("groups", {})
    return manager, tasks, groups


def _check_runnable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ParameterError(
            f"Got the task {name!r}, which runs code that the model writes. Run it with "
            "expertsteer-lm-eval and --confirm_run_unsafe_code, in a sandbox."
        )
    if getattr(task, "MULTIMODAL", False):
        raise ParameterError(f"Got the task {name!r}, which needs images, but expected text alone.")


def _fingerprint(task: Any, limit: int | None) -> str:
    """Return a hash of a task's settings and of the items that are asked."""
    digest = hashlib.sha256()
    docs = itertools.islice(task.eval_docs, limit)
    for part in itertools.chain([task.dump_config()], docs):
        text = json.dumps(part, sort_keys=True, default=str)
        # A function without source is written with its address.
        digest.update(_ADDRESS.sub("", text).encode() + b"\0")
    return digest.hexdigest()[:16]


def _run(
    model: LanguageModel,
    task: Any,
    manager: Any,
    steered: Mapping[str, Any],
    *,
    batch_size: int,
    **options: Any,
) -> tuple[list[dict[str, Any]], int]:
    """Run a task with the harness; return a row an item, and the number of solved examples."""
    import lm_eval

    from expertsteer.evaluation.harness import SteeredHarnessModel

    # The harness's decorators hide what these two take.
    harness_model: Any = SteeredHarnessModel
    simple_evaluate: Any = lm_eval.simple_evaluate
    lm = harness_model(model, batch_size=batch_size, **steered)
    name = task.task_name
    try:
        with _as_only_process():
            results = simple_evaluate(
                lm,
                tasks=[task],
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,  # our intervals are paired
                **options,
            )
    # How the harness refuses settings that a task does not go with.
    except (AssertionError, ValueError) as error:
        raise DataError(f"Cannot run the task {name!r}: {_reason(error)}") from error
    rows: dict[str, dict[str, Any]] = {}
    for sample in results["samples"][name]:
        row = rows.setdefault(
            str(sample["doc_id"]),
            {
                "name": str(sample["doc_id"]),
                "doc_hash": sample["doc_hash"],
                "prompt_hash": sample["prompt_hash"],
                "target": sample["target"],
                "resps": sample["resps"],
                "filtered_resps": {},
                "metrics": {},
                "is_cut": any(lm.lost_beginning(asked) for asked in sample["arguments"]),
            },
        )
        if sample["filter"] != "none":
            row["filtered_resps"][sample["filter"]] = sample["filtered_resps"]
        for metric in sample["metrics"]:
            row["metrics"][_label(metric, sample["filter"])] = sample[metric]
    n_shots = int(results["n-shot"][name])
    if options["num_fewshot"] not in (None, n_shots):
        warnings.warn(
            f"The task {name} fixes its number of solved examples: {n_shots} in place of "
            f"{options['num_fewshot']}.",
            stacklevel=2,
        )
    return [_plain(row) for row in rows.values()], n_shots


@contextmanager
def _as_only_process() -> Iterator[None]:
    """Keep the harness from leaving the results to the first process of a machine.

    A task at a strength is one process's alone.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = rank


def _label(metric: str, name: str) -> str:
    """Return a metric's name, with its filter's where the task names one."""
    return metric if name == "none" else f"{metric},{name}"


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return plain JSON types."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _pairs(label: str, rows: _Rows, unsteered: _Rows) -> tuple[list[Any], list[Any]]:
    """Return a metric of the items that have it, steered and unsteered."""
    names = [
        name
        for name, row in unsteered.items()
        if label in row["metrics"] and label in rows[name]["metrics"]
    ]
    values, before = (
        [source[name]["metrics"][label] for name in names] for source in (rows, unsteered)
    )
    return values, before


def _labels(unsteered: _Rows) -> list[str]:
    return list(dict.fromkeys(label for row in unsteered.values() for label in row["metrics"]))


def _is_mean(task: Any, label: str) -> bool:
    from lm_eval.api.metrics import mean

    # As the harness does for metrics that it knows no other way for.
    return task.aggregation().get(label.partition(",")[0], mean) is mean


def _summary(task: Any, found: Mapping[float, _Rows]) -> TaskEvaluation:
    unsteered = found[0.0]
    measurements: dict[float, dict[str, Measurement]] = {}
    for strength, rows in found.items():
        measurements[strength] = {}
        for label in _labels(unsteered):
            pairs = _pairs(label, rows, unsteered)
            metric = label.partition(",")[0]
            if _is_mean(task, label):
                measured = measure_means(*pairs)
            else:
                n_resamples = 100 if metric in _SLOW_METRICS else 2000
                measured = measure_statistics(task.aggregation()[metric], *pairs, n_resamples)
            measurements[strength][label] = measured
    n_cut = sum(row["is_cut"] for row in unsteered.values())
    return TaskEvaluation(measurements, len(unsteered), n_cut)


def _group_summary(
    group: Any, tasks: Mapping[str, Any], found: Mapping[str, dict[float, _Rows]]
) -> TaskEvaluation | None:
    """Return the metrics the harness has for a group: means over its tasks' means."""
    names = [task.task_name for task in group.get_all_tasks()]
    unsteered = {name: found[name][0.0] for name in names}
    labels = {name: _labels(unsteered[name]) for name in names}
    # By label: the tasks that have it, and whether larger ones weigh more.
    averaged: dict[str, tuple[list[str], bool]] = {}
    for wanted in group.aggregate_metric_list or ():
        for label in dict.fromkeys(itertools.chain(*labels.values())):
            metric, _, filter_name = label.partition(",")
            filters = wanted.filter_list or [filter_name or "none"]
            having = [name for name in names if label in labels[name]]
            if (
                metric == wanted.metric
                and (filter_name or "none") in filters
                and all(_is_mean(tasks[name], label) for name in having)
            ):
                averaged[label] = (having, wanted.weight_by_size)
    if not averaged:
        return None
    measurements: dict[float, dict[str, Measurement]] = {}
    for strength in found[names[0]]:
        measurements[strength] = {}
        for label, (having, weight_by_size) in averaged.items():
            pairs = [_pairs(label, found[name][strength], unsteered[name]) for name in having]
            values, before = zip(*pairs, strict=True)
            weights = [len(part) if weight_by_size else 1 for part in values]
            measurements[strength][label] = measure_strata(values, before, weights)
    every = [row for rows in unsteered.values() for row in rows.values()]
    return TaskEvaluation(measurements, len(every), sum(row["is_cut"] for row in every))
