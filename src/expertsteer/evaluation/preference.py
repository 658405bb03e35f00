"""Choose layer pairs by what their vectors do on the validation split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from expertsteer.data import LabelledExamples, render
from expertsteer.errors import ParameterError
from expertsteer.evaluation.lower_blocks import LowerBlocks
from expertsteer.evaluation.scoring import mean_log_likelihoods, whole_text_batches
from expertsteer.models import LanguageModel, ModelSource, load_model
from expertsteer.pack import SteeringPack

__all__ = ["choose_by_preference", "preference_gap", "require_model"]


def preference_gap(model: LanguageModel, examples: LabelledExamples, chat_template: bool) -> float:
    """Return how much likelier a model finds the positive texts than the negative ones.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    examples : LabelledExamples
        Of both classes.
    chat_template : bool
        Put the texts into the model's chat template.

    Returns
    -------
    float
        Difference of the classes' mean log-likelihood a token, in nats.

    Notes
    -----
    Source: this project.
    """
    return _gap(
        mean_log_likelihoods(model, render(examples, model.tokenizer, chat_template)), examples
    )


def _gap(scores: torch.Tensor, examples: LabelledExamples) -> float:
    positive = torch.from_numpy(examples.labels > 0)
    # A text of one token has no token to predict, and counts on neither side.
    return float(scores[positive].nanmean() - scores[~positive].nanmean())


def require_model(target: Any) -> None:
    """Raise ParameterError if a target that has to run is given as collected states."""
    if not isinstance(target, LanguageModel | ModelSource | str | Path):
        raise ParameterError(
            "Got the target as collected states with strategy='validated', which steers the "
            "target to choose layers. Pass the model, or choose strategy='lowest_mi'."
        )


def choose_by_preference(
    pack: SteeringPack,
    target: LanguageModel | ModelSource | str | Path | Any,
    validation: LabelledExamples,
    n_pairs: int,
    chat_template: bool = False,
) -> SteeringPack:
    """Keep the layers whose vectors raise the target's preference most.

    Each layer is steered alone, at the pack's strength; what it is worth is the change
    of `preference_gap` on the validation split.

    Parameters
    ----------
    pack : SteeringPack
        With the candidates.
    target : LanguageModel, ModelSource, str or Path
        The target; collected states are not enough here.
    validation : LabelledExamples
        The validation split.
    n_pairs : int
        How many layers to keep.
    chat_template : bool, default=False

    Returns
    -------
    SteeringPack
        With ``provenance["validated"]``: the change by layer, in nats a token.

    Raises
    ------
    ParameterError
        If the target is given as states.
    """
    require_model(target)
    model = load_model(target)
    texts = render(validation, model.tokenizer, chat_template)
    steerings = {layer: pack.restrict([layer]).apply(model) for layer in pack.layers}
    unsteered = torch.empty(len(texts))
    steered = {layer: torch.empty(len(texts)) for layer in pack.layers}
    for rows in whole_text_batches(model, texts):
        batch = [texts[row] for row in rows]
        # Memory for the blocks below the steered ones: of one batch.
        lower_blocks = LowerBlocks(model)
        with lower_blocks.remembered(pack.layers):
            unsteered[rows] = mean_log_likelihoods(model, batch, warn=False)
        for layer, steering in steerings.items():
            with lower_blocks.skipped(steering), steering:
                steered[layer][rows] = mean_log_likelihoods(model, batch, warn=False)
    before = _gap(unsteered, validation)
    gains = {layer: _gap(scores, validation) - before for layer, scores in steered.items()}
    best = sorted(pack.layers, key=lambda layer: gains[layer], reverse=True)[:n_pairs]
    provenance = pack.provenance | {"validated": {str(j): gain for j, gain in gains.items()}}
    return dataclasses.replace(pack.restrict(best), provenance=provenance)
