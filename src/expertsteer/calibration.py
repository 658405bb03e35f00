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

from expertsteer.data import LabelledExamples, RenderedText, render
from expertsteer.errors import ParameterError
from expertsteer.evaluation.intervals import mean_interval
from expertsteer.evaluation.multiple_choice import is_questions, questions_of, score_questions
from expertsteer.evaluation.scoring import (
    mean_log_likelihoods,
    token_divergences,
    token_log_likelihoods,
)
from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack
from expertsteer.provenance import package_versions

__all__ = ["DAMAGES", "Calibration", "Trial", "calibrate"]

DAMAGES = ("perplexity", "divergence")
# Strengths that every search tries first; the search goes on between and beyond them.
_FIRST_STRENGTHS = (0.05, 0.1, 0.2)
_PARTS_OF_PLAIN_TEXT = 4
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

    A tree-structured Parzen estimator proposes strengths (and layers, where the pack has
    several: all of them or one). The damage is measured first, a part of the plain text
    at a time, and ends a trial that is over the budget before its effect is measured.

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
        Largest strength tried; the smallest is a hundredth of it.
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
        raise ParameterError(f"Got budget={budget}, but expected more than {least:g}, no {damage}.")
    if not (math.isfinite(max_strength) and max_strength > 0):
        raise ParameterError(f"Got max_strength={max_strength}, but expected a positive number.")
    if not plain_text:
        raise ParameterError("Got no plain text, but expected some to measure the damage on.")
    pack.check_target(model, force=force)
    values, name = _effect_of(model, examples, chat_template, seed)
    unsteered = values()
    texts = [RenderedText(text, 0, False) for text in plain_text]
    damage_of = _damage_of(model, texts, damage, budget)

    def steering(strength: float, layers: tuple[int, ...]) -> AbstractContextManager[Any]:
        return pack.restrict(layers).apply(model, strength, positions, force=force)

    def attempt(strength: float, layers: tuple[int, ...]) -> Trial:
        found = damage_of(steering(strength, layers))
        if found > budget:
            return Trial(strength, layers, found, within_budget=False)
        with steering(strength, layers):
            change = values() - unsteered
        return Trial(strength, layers, found, True, float(change.mean()), mean_interval(change))

    choices = [pack.layers] + ([(layer,) for layer in pack.layers] if len(pack.layers) > 1 else [])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True)
    )
    for strength in _FIRST_STRENGTHS:
        if strength <= max_strength:
            study.enqueue_trial({"strength": strength, "layers": 0})
    trials: list[Trial] = []
    for _ in tqdm(range(n_trials), desc="calibration", delay=1, disable=not progress):
        proposed = study.ask()
        strength = proposed.suggest_float("strength", max_strength / 100, max_strength, log=True)
        layers = choices[proposed.suggest_categorical("layers", range(len(choices)))]
        trial = attempt(strength, layers)
        trials.append(trial)
        # Over the budget, less damage is better, and anything within it is better still.
        worth = trial.effect if trial.effect is not None else -1e3 - min(trial.damage, 1e6)
        study.tell(proposed, worth)
    chosen = _best(trials)
    calibrated = dataclasses.replace(
        pack.restrict(chosen.layers) if chosen else pack, strength=chosen.strength if chosen else 0
    )
    result = Calibration(calibrated, tuple(trials), chosen, budget, damage, name)
    provenance = result.to_dict() | {
        "data": examples.summary(),
        "positions": positions,
        "n_plain_texts": len(texts),
        "seed": seed,
        "versions": package_versions() | {"optuna": optuna.__version__},
    }
    calibrated = dataclasses.replace(
        calibrated, provenance=pack.provenance | {"calibration": provenance}
    )
    return dataclasses.replace(result, pack=calibrated)


def _effect_of(
    model: LanguageModel, examples: LabelledExamples, chat_template: bool, seed: int
) -> tuple[Callable[[], np.ndarray], str]:
    """Return a function that measures every validation item, and what it measures."""
    validation = examples.split("validation")
    if is_questions(validation):
        questions = questions_of(
            examples, model, split="validation", chat_template=chat_template, seed=seed
        )

        def log_odds() -> np.ndarray:
            rows = {row["name"]: row for row in score_questions(model, questions, progress=False)}
            found = []
            for question in questions:
                scores = np.array(rows[question.name]["log_likelihoods"])
                others = np.delete(scores, question.right)
                found.append(scores[question.right] - np.logaddexp.reduce(others))
            return np.array(found)

        return log_odds, "log-odds of the right answer"
    texts = render(validation, model.tokenizer, chat_template)
    signs = validation.labels.astype(np.float64)

    def preference() -> np.ndarray:
        # A text of one token has no token to predict, and counts on neither side.
        return np.nan_to_num(signs * mean_log_likelihoods(model, texts).numpy())

    return preference, "log-likelihood a token, turned round for negative texts"


def _damage_of(
    model: LanguageModel, texts: Sequence[RenderedText], damage: str, budget: float
) -> Callable[[AbstractContextManager[Any]], float]:
    """Return a function that measures a steering's damage, up to where it is hopeless."""
    parts = [texts[part::_PARTS_OF_PLAIN_TEXT] for part in range(_PARTS_OF_PLAIN_TEXT)]
    least = 1.0 if damage == "perplexity" else 0.0
    unsteered = [token_log_likelihoods(model, part) for part in parts] if least else []

    def losses(part: int, steering: AbstractContextManager[Any]) -> list[torch.Tensor]:
        if damage == "divergence":
            return [found.divergence for found in token_divergences(model, parts[part], steering)]
        with steering:
            steered = token_log_likelihoods(model, parts[part])
        return [before - after for before, after in zip(unsteered[part], steered, strict=True)]

    def measure(steering: AbstractContextManager[Any]) -> float:
        total, n_tokens, value = 0.0, 0, least
        for part in range(len(parts)):
            for found in losses(part, steering):
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
