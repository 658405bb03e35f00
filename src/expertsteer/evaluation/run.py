"""Evaluate a target unsteered and steered on the same items; a row an item, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertsteer.data import RenderedText
from expertsteer.errors import DataError
from expertsteer.evaluation.generations import GenerationTask
from expertsteer.evaluation.intervals import mean_interval
from expertsteer.evaluation.multiple_choice import ChoiceTask
from expertsteer.evaluation.open_answers import OpenTask
from expertsteer.evaluation.row_file import RowFile
from expertsteer.evaluation.scoring import token_divergences
from expertsteer.files import write_text
from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack
from expertsteer.provenance import describe_machine, package_versions
from expertsteer.steering import Steering

__all__ = ["Evaluation", "Measurement", "evaluate"]


@dataclass(frozen=True)
class Measurement:
    """The mean of a metric over items.

    Attributes
    ----------
    mean : float
    interval : tuple of (float, float)
        95 % bootstrap interval over the items.
    change : float
        From unsteered, on the same items.
    change_interval : tuple of (float, float)
        95 % paired bootstrap interval.
    """

    mean: float
    interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """What a target answers at every strength, and what steering costs.

    Attributes
    ----------
    measurements : dict of float to dict of str to Measurement
        By strength (0 is unsteered) and metric; means are over items, of which each is a
        question or all samples of a prompt. A metric that no item has is left out.
    perplexity : dict of float to float
        Of the plain text, by strength.
    divergence : dict of float to float
        Mean KL divergence a token of the plain text from unsteered, in nats.
    n_questions, n_plain_texts : int
    provenance : dict
    """

    measurements: dict[float, dict[str, Measurement]]
    perplexity: dict[float, float]
    divergence: dict[float, float]
    n_questions: int
    n_plain_texts: int
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
    values = [0.0, *(strengths or ([pack.strength] if pack else []))] if pack else [0.0]
    provenance = {
        "target": model.description.to_dict(),
        "pack": pack.summary() if pack else None,
        "task": task.summary(),
        "settings": {
            "positions": positions,
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "plain_text": hashlib.sha256("\n".join(plain_text).encode()).hexdigest()[:16],
        },
        "versions": package_versions(),
    }
    if isinstance(task, GenerationTask):
        task.check(model, pack)
    _claim(folder, provenance)

    def steering(strength: float) -> Steering | None:
        if pack is None or strength == 0:
            return None
        return pack.apply(model, strength, positions, force=force)

    with RowFile(folder / "rows.jsonl") as file:
        for strength in values:
            done = {row["name"] for row in file.rows if row["strength"] == strength}
            left: list[Any] = [question for question in task.questions if question.name not in done]

            def keep(new: list[dict[str, Any]], strength: float = strength) -> None:
                file.add({"strength": strength} | row for row in new)

            with steering(strength) or nullcontext():
                task.score(model, left, keep, progress)
        rows = file.rows
    if isinstance(task, GenerationTask):
        task.write_blind_sample(rows, folder)
    with RowFile(folder / "plain.jsonl") as file:
        for strength in values:
            done = {row["text"] for row in file.rows if row["strength"] == strength}
            left = [n for n in range(len(plain_text)) if n not in done]
            texts = [RenderedText(str(plain_text[n]), 0, False) for n in left]
            for n, damage in zip(
                left, token_divergences(model, texts, steering(strength)), strict=True
            ):
                row = {
                    "strength": strength,
                    "text": n,
                    "n_tokens": len(damage.divergence),
                    "log_likelihood": float(damage.steered_log_likelihood.sum()),
                    "divergence": float(damage.divergence.sum()),
                }
                file.add([row])
        plain = file.rows
    result = _summary(
        task.metrics, rows, plain, values, provenance | {"machine": describe_machine()}
    )
    write_text(folder / "summary.json", json.dumps(result.to_dict(), indent=2))
    return result


def _claim(folder: Path, provenance: dict[str, Any]) -> None:
    """Note whose folder this is, or raise where it is another run's."""
    path = folder / "run.json"
    # As JSON has it: tuples have become lists.
    wanted = json.loads(json.dumps(provenance))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_text(path, json.dumps(wanted, indent=2))
        return
    except ValueError as error:
        raise DataError(f"Got {path}, but expected JSON. Name another folder.") from error
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise DataError(
            f"Got the folder {folder} of another run ({', '.join(differing)} differ), but expected "
            "an empty one or the same run's. Name another folder or remove this one."
        )


def _summary(
    metrics: Sequence[str],
    rows: list[dict[str, Any]],
    plain: list[dict[str, Any]],
    strengths: Sequence[float],
    provenance: dict[str, Any],
) -> Evaluation:
    by_strength = {
        strength: {row["name"]: row for row in rows if row["strength"] == strength}
        for strength in strengths
    }
    items: dict[str, list[str]] = {}
    for name, row in by_strength[0.0].items():
        items.setdefault(row.get("group", name), []).append(name)
    measurements: dict[float, dict[str, Measurement]] = {}
    for strength, found in by_strength.items():
        measurements[strength] = {}
        for metric in metrics:
            values = _item_means(found, items, metric)
            changes = values - _item_means(by_strength[0.0], items, metric)
            values, changes = (part[~np.isnan(part)] for part in (values, changes))
            if not len(changes):  # no item has both
                continue
            measurements[strength][metric] = Measurement(
                float(values.mean()),
                mean_interval(values),
                float(changes.mean()),
                mean_interval(changes),
            )
    perplexity, divergence = {}, {}
    for strength in strengths:
        chosen = [row for row in plain if row["strength"] == strength]
        n_tokens = sum(row["n_tokens"] for row in chosen)
        if n_tokens:
            total = sum(row["log_likelihood"] for row in chosen)
            perplexity[strength] = float(np.exp(-total / n_tokens))
            divergence[strength] = sum(row["divergence"] for row in chosen) / n_tokens
    n_plain = sum(row["strength"] == 0 for row in plain)
    return Evaluation(measurements, perplexity, divergence, len(items), n_plain, provenance)


def _item_means(
    rows: Mapping[str, dict[str, Any]], items: Mapping[str, Sequence[str]], metric: str
) -> np.ndarray:
    """Return a metric's mean over the rows of each item, NaN where none of them has it."""
    means = []
    for names in items.values():
        values = [rows[name][metric] for name in names if rows[name][metric] is not None]
        means.append(sum(values) / len(values) if values else np.nan)
    return np.array(means, dtype=np.float64)
