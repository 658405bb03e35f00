"""Evaluate a target unsteered and steered on the same items; a row an item, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from expertsteer.evaluation.damage import Damage, measure_damage
from expertsteer.evaluation.generations import GenerationTask
from expertsteer.evaluation.lower_blocks import LowerBlocks
from expertsteer.evaluation.measurements import Measurement, measure_means
from expertsteer.evaluation.multiple_choice import ChoiceTask
from expertsteer.evaluation.open_answers import OpenTask
from expertsteer.evaluation.questions import QuestionBatch
from expertsteer.evaluation.row_file import (
    SharedRows,
    claim_folder,
    done_by_strength,
    strengths_left,
)
from expertsteer.files import write_text
from expertsteer.locks import locked
from expertsteer.models import LanguageModel
from expertsteer.models.cache import require_disk
from expertsteer.pack import SteeringPack
from expertsteer.processes import is_main_process, n_processes, share
from expertsteer.provenance import describe_machine, package_versions
from expertsteer.steering import Steering

__all__ = ["Evaluation", "describe_run", "evaluate", "steering_by_strength"]


@dataclass(frozen=True)
class Evaluation(Damage):
    """What a target answers at every strength, and what steering costs.

    Attributes
    ----------
    measurements : dict of float to dict of str to Measurement
        By strength (0 is unsteered) and metric. Means are over the items that have the
        metric there and unsteered, each a question or all samples of a prompt; a metric
        that no item has is left out.
    n_questions : int
        Questions or prompts.
    n_cut : int
        Questions whose prompt lost its beginning because it did not fit the context.
    provenance : dict
    perplexity, divergence, n_plain_texts, n_plain_cut
        As in `Damage`.
    """

    measurements: dict[float, dict[str, Measurement]]
    n_questions: int
    n_cut: int
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON types."""
        return asdict(self)


def evaluate(
    model: LanguageModel,
    task: ChoiceTask | OpenTask | GenerationTask,
    output: str | Path,
    *,
    pack: SteeringPack | None = None,
    strengths: Sequence[float] = (),
    positions: str = "all",
    plain_text: Sequence[str] = (),
    force: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a target on questions, unsteered and steered.

    Parameters
    ----------
    model : LanguageModel
    task : ChoiceTask, OpenTask or GenerationTask
        Questions and how they are scored. Figures come from the test split; choices
        belong to the validation split.
    output : str or Path
        A folder: ``rows.jsonl`` (a row a question and strength), ``plain.jsonl`` (a row a
        plain text and strength), ``run.json`` (the settings), ``summary.json``; from
        generations also a blind sample. A folder of the same run is continued.
    pack : SteeringPack, optional
        None evaluates the model as it is.
    strengths : sequence of float
        Relative to the mean residual norm; default: the pack's own.
    positions : {"all", "prompt", "generated", "last"}, default="all"
        The answers that are scored count as generated.
    plain_text : sequence of str
        For perplexity and divergence; none: these are left out.
    force : bool, default=False
        See `SteeringPack.check_target`.
    progress : bool, default=True

    Returns
    -------
    Evaluation

    Raises
    ------
    DataError
        If there are no questions, or the folder holds another run; with generations, if a
        judge was trained on the pack's data.
    ModelError
        If the fluency model of generations is the target.
    """
    folder = Path(output)
    steerings = steering_by_strength(model, pack, strengths, positions, force=force)
    # An older run's rows without one of the metrics are another run's.
    about = task.summary() | {"metrics": list(task.metrics)}
    provenance = describe_run(model, pack, about, positions, plain_text)
    if isinstance(task, GenerationTask):
        task.check(model, pack)
    require_disk(folder, 0, "rows")
    with locked(folder, "evaluation"):
        claim_folder(folder, provenance)
        rows = _score_all(model, task, steerings, folder / "rows.jsonl", progress)
        if isinstance(task, GenerationTask) and is_main_process():
            task.write_blind_sample(rows, folder)
        damage = measure_damage(model, plain_text, steerings, folder / "plain.jsonl")
        result = _summary(task, steerings, rows, damage, provenance)
        if is_main_process():
            write_text(folder / "summary.json", json.dumps(result.to_dict(), indent=2))
    return result


def _score_all(
    model: LanguageModel,
    task: ChoiceTask | OpenTask | GenerationTask,
    steerings: dict[float, Steering | None],
    path: Path,
    progress: bool,
) -> list[dict[str, Any]]:
    """Score what is left of a task at every strength; return all rows in order."""
    # Of all questions, whatever is left: what shares a batch decides the last bits.
    batches: list[QuestionBatch[Any]] = task.batches(model)
    with SharedRows(path) as file:
        done = done_by_strength(file.rows, steerings, "name")

        def left(batch: QuestionBatch[Any]) -> list[float]:
            return strengths_left(done, (question.name for question in batch.questions))

        total = len(task.questions) * len(steerings)
        shown = progress and is_main_process()
        with tqdm(desc="questions", total=total, delay=1, disable=not shown) as bar:
            bar.update(sum(map(len, done.values())))
            for batch in share([batch for batch in batches if left(batch)]):
                # Memory for the blocks below the steered ones: of one batch.
                with LowerBlocks(model).shared(steerings):
                    for strength in left(batch):
                        with steerings[strength] or nullcontext():
                            new = task.score_batch(model, batch)
                        file.add(
                            {"strength": strength} | row
                            for row in new
                            if row["name"] not in done[strength]
                        )
                        bar.update(len(batch.questions) * n_processes())
        order = {strength: place for place, strength in enumerate(steerings)}
        names = [question.name for batch in batches for question in batch.questions]
        places = {name: place for place, name in enumerate(names)}
        return file.gather(
            lambda row: (
                order.get(row["strength"], len(order)),
                places.get(row["name"], len(places)),
            ),
            "answering questions",
        )


def _summary(
    task: ChoiceTask | OpenTask | GenerationTask,
    steerings: dict[float, Steering | None],
    rows: list[dict[str, Any]],
    damage: Damage,
    provenance: dict[str, Any],
) -> Evaluation:
    unsteered = {row["name"]: row for row in rows if row["strength"] == 0}
    measurements: dict[float, dict[str, Measurement]] = {}
    for strength in steerings:
        found = {row["name"]: row for row in rows if row["strength"] == strength}
        measured = {metric: _measure(metric, found, unsteered) for metric in task.metrics}
        measurements[strength] = {name: value for name, value in measured.items() if value}
    return Evaluation(
        **vars(damage),
        measurements=measurements,
        n_questions=len({row.get("group", name) for name, row in unsteered.items()}),
        n_cut=sum(row["is_cut"] for row in unsteered.values()),
        provenance=provenance | {"machine": describe_machine()},
    )


def steering_by_strength(
    model: LanguageModel,
    pack: SteeringPack | None,
    strengths: Sequence[float],
    positions: str,
    *,
    force: bool,
) -> dict[float, Steering | None]:
    """Return the steerings of an evaluation, by strength: none at 0, which is always there.

    Without strengths, the pack's own; without a pack, unsteered alone.
    """
    if pack is None:
        return {0.0: None}
    values = dict.fromkeys([0.0, *(strengths or [pack.resolve_strength()])])
    return {
        strength: pack.apply(model, strength, positions, force=force) if strength else None
        for strength in values
    }


def describe_run(
    model: LanguageModel,
    pack: SteeringPack | None,
    task: dict[str, Any],
    positions: str,
    plain_text: Sequence[str],
) -> dict[str, Any]:
    """Return what decides the rows of an evaluation, as plain JSON types."""
    return {
        "target": model.description.to_dict(),
        "pack": pack.summary() if pack else None,
        "task": task,
        "settings": {
            "positions": positions,
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "plain_text": hashlib.sha256("\n".join(plain_text).encode()).hexdigest()[:16],
        },
        "versions": package_versions(),
    }


def _measure(
    metric: str, rows: dict[str, dict[str, Any]], unsteered: dict[str, dict[str, Any]]
) -> Measurement | None:
    """Return a metric's measurement over the items that have it in both, if any."""
    before, after = (_item_means(metric, found) for found in (unsteered, rows))
    items = [item for item in before if item in after]
    if not items:
        return None
    return measure_means([after[item] for item in items], [before[item] for item in items])


def _item_means(metric: str, rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return a metric's mean over each item's rows: those of a group are one item."""
    values: dict[str, list[float]] = {}
    for name, row in rows.items():
        if row[metric] is not None:
            values.setdefault(row.get("group", name), []).append(row[metric])
    return {item: sum(found) / len(found) for item, found in values.items()}
