"""Evaluate a target unsteered and steered on the same items; a row an item, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertsteer.evaluation.damage import Damage, measure_damage
from expertsteer.evaluation.generations import GenerationTask
from expertsteer.evaluation.measurements import Measurement, measure_means
from expertsteer.evaluation.multiple_choice import ChoiceTask
from expertsteer.evaluation.open_answers import OpenTask
from expertsteer.evaluation.row_file import RowFile, claim_folder
from expertsteer.files import write_text
from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack
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
    claim_folder(folder, provenance)
    with RowFile(folder / "rows.jsonl") as file:
        for strength, steering in steerings.items():
            done = {row["name"] for row in file.rows if row["strength"] == strength}
            left: list[Any] = [question for question in task.questions if question.name not in done]

            def keep(new: list[dict[str, Any]], strength: float = strength) -> None:
                file.add({"strength": strength} | row for row in new)

            with steering or nullcontext():
                task.score(model, left, keep, progress)
        rows = file.rows
    if isinstance(task, GenerationTask):
        task.write_blind_sample(rows, folder)
    damage = measure_damage(model, plain_text, steerings, folder / "plain.jsonl")
    unsteered = {row["name"]: row for row in rows if row["strength"] == 0}
    measurements: dict[float, dict[str, Measurement]] = {}
    for strength in steerings:
        found = {row["name"]: row for row in rows if row["strength"] == strength}
        measured = {metric: _measure(metric, found, unsteered) for metric in task.metrics}
        measurements[strength] = {name: value for name, value in measured.items() if value}
    result = Evaluation(
        **vars(damage),
        measurements=measurements,
        n_questions=len({row.get("group", name) for name, row in unsteered.items()}),
        n_cut=sum(row["is_cut"] for row in unsteered.values()),
        provenance=provenance | {"machine": describe_machine()},
    )
    write_text(folder / "summary.json", json.dumps(result.to_dict(), indent=2))
    return result


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
    values = dict.fromkeys([0.0, *(strengths or [pack.strength])])
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
