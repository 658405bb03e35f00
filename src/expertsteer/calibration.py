"""Choose a pack's strength and layers by what they do on the validation split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from expertsteer.data import LabelledExamples, RenderedText
from expertsteer.errors import ParameterError
from expertsteer.evaluation.intervals import mean_interval
from expertsteer.evaluation.labelled_texts import TextTask, labelled_texts_of
from expertsteer.evaluation.lower_blocks import LowerBlocks
from expertsteer.evaluation.multiple_choice import ChoiceTask, is_questions, questions_of
from expertsteer.evaluation.scoring import token_divergences, token_log_likelihoods
from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack
from expertsteer.provenance import package_versions

__all__ = [
    "DAMAGES",
    "Calibration",
    "Trial",
    "calibrate",
    "damage_meter",
    "item_values",
    "strength_at_budget",
    "validation_task",
]

DAMAGES = ("perplexity", "divergence")
# Shares of the strongest steering within the budget that every search tries first.
_FIRST_FRACTIONS = (1.0, 0.5, 0.25)
_FIRST_STRENGTH = 0.1
# A loss from this share of the budget up needs no stronger steering.
_NEAR_BUDGET = 0.9
# How the loss grows with the strength until two strengths have shown it: with the square.
_FIRST_EXPONENT = 2.0
_MEASURES = {
    "log_odds": "log-odds of the right answer",
    "preference": "log-likelihood a token, turned round for negative texts",
}
_PARTS_OF_PLAIN_TEXT = 2
# A part of the plain text this far over the budget is not read to its end.
_HOPELESS = 1.5


@dataclass(frozen=True)
class Trial:
    """A strength and layers that were tried.

    Attributes
    ----------
    strength : float
    layers : tuple of int
    damage : float
        Perplexity over the unsteered one, or KL divergence a token in nats; of a part of
        the plain text where that was hopeless.
    within_budget : bool
    effect : float or None
        Mean change on the validation split; None where the damage was over the budget.
    effect_interval : tuple of (float, float) or None
        95 % paired bootstrap interval.
    """

    strength: float
    layers: tuple[int, ...]
    damage: float
    within_budget: bool
    effect: float | None = None
    effect_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Calibration:
    """What a calibration tried and chose.

    Attributes
    ----------
    pack : SteeringPack
        With the chosen layers and strength; strength 0 where nothing beats it.
    trials : tuple of Trial
    chosen : Trial or None
        None where nothing beats zero strength.
    budget : float
    damage : str
        What the budget is of.
    effect : str
        What the effect is the change of.
    """

    pack: SteeringPack
    trials: tuple[Trial, ...]
    chosen: Trial | None
    budget: float
    damage: str
    effect: str

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as plain JSON types, without the pack."""
        fields = {"budget": self.budget, "damage": self.damage, "effect": self.effect}
        chosen = asdict(self.chosen) if self.chosen else None
        return fields | {"chosen": chosen, "trials": [asdict(trial) for trial in self.trials]}


def calibrate(
    model: LanguageModel,
    pack: SteeringPack,
    examples: LabelledExamples,
    plain_text: Sequence[str],
    *,
    budget: float = 1.1,
    damage: str = "perplexity",
    max_strength: float = 0.5,
    n_trials: int = 16,
    positions: str = "all",
    chat_template: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Calibration:
    """Find the largest effect on the validation split within a damage budget.

    The strongest steering within the budget is found first, on plain text alone. A
    tree-structured Parzen estimator then proposes shares of it (and layers, where the pack
    has several: all of them or one). The damage is measured before the effect, a part of
    the plain text at a time, and ends a trial that is over the budget.

    Parameters
    ----------
    model : LanguageModel
        The target.
    pack : SteeringPack
    examples : LabelledExamples
        Only the validation split is read. For questions the effect is the change of the
        right answer's log-odds, for labelled texts of their log-likelihood a token,
        turned round for negative ones; both in nats.
    plain_text : sequence of str
        What the damage is measured on.
    budget : float, default=1.1
        Most damage: perplexity over the unsteered one (above 1), or KL divergence a token
        in nats (above 0).
    damage : {"perplexity", "divergence"}, default="perplexity"
    max_strength : float, default=0.5
        Largest strength tried.
    n_trials : int, default=16
    positions : {"all", "prompt", "generated", "last"}, default="all"
    chat_template : bool, default=False
    seed : int, default=0
        Of the search.
    force : bool, default=False
        See `SteeringPack.check_target`.
    progress : bool, default=True

    Returns
    -------
    Calibration
        Its choice is the trial of largest effect among those within the budget whose
        interval is above zero.

    Raises
    ------
    ParameterError
        On a budget nothing can meet, an unknown damage or no plain text.
    DataError
        If the validation split is empty.

    Notes
    -----
    Source: this project; the search is Optuna's (Akiba and others, 2019).
    """
    import optuna

    least = 1.0 if damage == "perplexity" else 0.0
    if damage not in DAMAGES:
        raise ParameterError(f"Got damage={damage!r}, but expected one of {', '.join(DAMAGES)}.")
    if not (math.isfinite(budget) and budget > least):
        raise ParameterError(
            f"Got budget={budget}, but expected more than {least:g}, which is {damage} undamaged."
        )
    if not (math.isfinite(max_strength) and max_strength > 0):
        raise ParameterError(f"Got max_strength={max_strength}, but expected a positive number.")
    if not plain_text:
        raise ParameterError("Got no plain text, but expected some to measure the damage on.")
    pack.check_target(model, force=force)
    task, metric = validation_task(model, examples, chat_template)
    unsteered = item_values(model, task, metric)
    damage_of = damage_meter(model, plain_text, damage, budget)
    lower_blocks = LowerBlocks(model)

    def steering(strength: float, layers: tuple[int, ...]) -> AbstractContextManager[Any]:
        return pack.restrict(layers).apply(model, strength, positions, force=force)

    def attempt(strength: float, layers: tuple[int, ...]) -> Trial:
        found = damage_of(steering(strength, layers))
        if found > budget:
            return Trial(strength, layers, found, within_budget=False)
        steered = steering(strength, layers)
        with lower_blocks.skipped(steered), steered:
            change = item_values(model, task, metric) - unsteered
        return Trial(strength, layers, found, True, float(change.mean()), mean_interval(change))

    def strongest(layers: tuple[int, ...]) -> float:
        if layers not in bounds:
            bounds[layers] = strength_at_budget(
                lambda strength: damage_of(steering(strength, layers)),
                budget,
                damage=damage,
                max_strength=max_strength,
            )
        return bounds[layers]

    bounds: dict[tuple[int, ...], float] = {}
    choices = [pack.layers] + ([(layer,) for layer in pack.layers] if len(pack.layers) > 1 else [])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True)
    )
    for fraction in _FIRST_FRACTIONS:
        study.enqueue_trial({"fraction": fraction, "layers": 0})
    trials: list[Trial] = []
    for _ in tqdm(range(n_trials), desc="calibration", delay=1, disable=not progress):
        proposed = study.ask()
        fraction = proposed.suggest_float("fraction", 0.05, 1.0)
        layers = choices[proposed.suggest_categorical("layers", range(len(choices)))]
        # Where not even a weak one is within the budget, the trial says how far over it is.
        trial = attempt(fraction * (strongest(layers) or max_strength / 100), layers)
        trials.append(trial)
        # Over the budget, less damage is better, and anything within it is better still.
        worth = trial.effect if trial.effect is not None else -1e3 - min(trial.damage, 1e6)
        study.tell(proposed, worth)
    chosen = _best(trials)
    calibrated = dataclasses.replace(
        pack.restrict(chosen.layers) if chosen else pack, strength=chosen.strength if chosen else 0
    )
    result = Calibration(calibrated, tuple(trials), chosen, budget, damage, _MEASURES[metric])
    provenance = result.to_dict() | {
        "data": examples.summary(),
        "positions": positions,
        "n_plain_texts": len(plain_text),
        "seed": seed,
        "versions": package_versions() | {"optuna": optuna.__version__},
    }
    calibrated = dataclasses.replace(
        calibrated, provenance=pack.provenance | {"calibration": provenance}
    )
    return dataclasses.replace(result, pack=calibrated)


def validation_task(
    model: LanguageModel, examples: LabelledExamples, chat_template: bool = False
) -> tuple[ChoiceTask | TextTask, str]:
    """Return what the effect of steering is measured on, and the name of its measure.

    Parameters
    ----------
    model : LanguageModel
        Supplies the chat template.
    examples : LabelledExamples
        Only the validation split is read.
    chat_template : bool, default=False

    Returns
    -------
    task : ChoiceTask or TextTask
        Questions where the examples are such, labelled texts otherwise.
    metric : {"log_odds", "preference"}
        The field of its rows.
    """
    validation = examples.split("validation")
    if is_questions(validation):
        questions = questions_of(validation, model, split="validation", chat_template=chat_template)
        return ChoiceTask(tuple(questions)), "log_odds"
    texts = labelled_texts_of(validation, model, chat_template)
    return TextTask(tuple(texts)), "preference"


def item_values(model: LanguageModel, task: Any, metric: str) -> np.ndarray:
    """Return a metric of every item of a task, in the task's order."""
    rows: list[dict[str, Any]] = []
    task.score(model, task.questions, rows.extend, False)
    found = {row["name"]: row[metric] for row in rows}
    return np.array([found[question.name] for question in task.questions], dtype=np.float64)


def strength_at_budget(
    damage_of: Callable[[float], float],
    budget: float,
    *,
    damage: str = "perplexity",
    max_strength: float = 0.5,
    max_evaluations: int = 10,
) -> float:
    """Find the largest strength whose damage is within the budget, to a few per cent.

    The loss of log-likelihood grows with a power of the strength, where steering is weak
    with about the square, so the next guess follows from the last two; what is known to be
    within and over the budget brackets it.

    Parameters
    ----------
    damage_of : callable
        From a strength to the damage it does.
    budget : float
        As in `calibrate`.
    damage : {"perplexity", "divergence"}, default="perplexity"
    max_strength : float, default=0.5
        Never more than this.
    max_evaluations : int, default=10

    Returns
    -------
    float
        0 where even the weakest strength tried is over the budget.

    Notes
    -----
    Source: this project.
    """
    allowed = math.log(budget) if damage == "perplexity" else budget
    within, over = 0.0, math.inf
    exponent, last = _FIRST_EXPONENT, None
    guess = min(_FIRST_STRENGTH, max_strength)
    for _ in range(max_evaluations):
        found = damage_of(guess)
        loss = math.log(found) if damage == "perplexity" else found
        if loss <= allowed:
            within = max(within, guess)
            if loss >= _NEAR_BUDGET * allowed or guess >= max_strength:
                break
        else:
            over = min(over, guess)
        if last is not None and min(loss, last[1]) > 0:
            grown = math.log(loss / last[1]) / math.log(guess / last[0])
            exponent = min(max(grown, 1.0), 4.0)
        last = (guess, loss)
        # Half-way between what is near enough and the budget itself.
        aim = 0.5 * (1 + _NEAR_BUDGET) * allowed
        guess *= min(max((aim / loss) ** (1 / exponent), 0.1), 2.5) if loss > 0 else 2.5
        if not within < guess < over:
            guess = math.sqrt(within * over) if within else over / 4
        guess = min(guess, max_strength)
    return within


def damage_meter(
    model: LanguageModel, texts: Sequence[str], damage: str = "perplexity", budget: float = math.inf
) -> Callable[[AbstractContextManager[Any]], float]:
    """Return a function that measures a steering's damage, up to where it is hopeless.

    Parameters
    ----------
    model : LanguageModel
        Unsteered.
    texts : sequence of str
        Plain text; for "perplexity" it is read unsteered once, now.
    damage : {"perplexity", "divergence"}, default="perplexity"
        Perplexity over the unsteered one, or KL divergence a token in nats.
    budget : float
        A part of the text far over it ends the measurement; default: never.

    Returns
    -------
    callable
        From a context manager that steers the model to the damage.
    """
    rendered = [RenderedText(text, 0, False) for text in texts]
    parts = [rendered[part::_PARTS_OF_PLAIN_TEXT] for part in range(_PARTS_OF_PLAIN_TEXT)]
    least = 1.0 if damage == "perplexity" else 0.0
    unsteered = [token_log_likelihoods(model, part) for part in parts] if least else []
    lower_blocks = LowerBlocks(model)

    def losses(part: int, steering: AbstractContextManager[Any]) -> list[torch.Tensor]:
        if damage == "divergence":
            return [found.divergence for found in token_divergences(model, parts[part], steering)]
        with steering:
            steered = token_log_likelihoods(model, parts[part])
        return [before - after for before, after in zip(unsteered[part], steered, strict=True)]

    def measure(steering: AbstractContextManager[Any]) -> float:
        total, n_tokens, value = 0.0, 0, least
        for part in range(len(parts)):
            with lower_blocks.skipped(steering):
                changes = losses(part, steering)
            for found in changes:
                total += float(found.sum())
                n_tokens += len(found)
            mean = total / max(n_tokens, 1)
            value = math.exp(min(mean, 700.0)) if damage == "perplexity" else mean
            if value - least > _HOPELESS * (budget - least):
                break
        return value

    return measure


def _best(trials: Sequence[Trial]) -> Trial | None:
    better = [
        trial
        for trial in trials
        if trial.effect_interval is not None and trial.effect_interval[0] > 0
    ]
    return max(better, key=lambda trial: trial.effect or 0.0, default=None)
