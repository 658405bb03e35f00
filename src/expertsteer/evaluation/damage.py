"""The damage of steering to plain text, a row a text and strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertsteer.data import RenderedText
from expertsteer.evaluation.lower_blocks import LowerBlocks
from expertsteer.evaluation.row_file import SharedRows, done_by_strength, strengths_left
from expertsteer.evaluation.scoring import token_divergences, whole_text_batches
from expertsteer.models import LanguageModel
from expertsteer.processes import share
from expertsteer.steering import Steering

__all__ = ["Damage", "measure_damage"]


@dataclass(frozen=True)
class Damage:
    """What steering costs on plain text.

    Attributes
    ----------
    perplexity : dict of float to float
        Of the plain text, by strength (0 is unsteered).
    divergence : dict of float to float
        Mean KL divergence a token of the plain text from unsteered, in nats.
    n_plain_texts : int
    n_plain_cut : int
        Texts that lost their end because they did not fit the context.
    """

    perplexity: dict[float, float]
    divergence: dict[float, float]
    n_plain_texts: int
    n_plain_cut: int


def measure_damage(
    model: LanguageModel,
    plain_text: Sequence[str],
    steerings: Mapping[float, Steering | None],
    path: Path,
) -> Damage:
    """Read plain text unsteered and steered; an interrupted reading goes on.

    Parameters
    ----------
    model : LanguageModel
        Unsteered.
    plain_text : sequence of str
    steerings : mapping of float to Steering or None
        By strength; None at 0.
    path : Path
        The file of the rows.

    Returns
    -------
    Damage
    """
    texts = [RenderedText(str(text), 0, False) for text in plain_text]
    batches = whole_text_batches(model, texts)
    with SharedRows(path) as file:
        done = done_by_strength(file.rows, steerings, "text")
        for batch in share([batch for batch in batches if strengths_left(done, batch)]):
            read = [texts[n] for n in batch]
            with LowerBlocks(model).shared(steerings):
                for strength in strengths_left(done, batch):
                    damages = token_divergences(model, read, steerings[strength], warn=False)
                    file.add(
                        {
                            "strength": strength,
                            "text": n,
                            "n_tokens": len(damage.divergence),
                            "log_likelihood": float(damage.steered_log_likelihood.sum()),
                            "divergence": float(damage.divergence.sum()),
                            "is_cut": damage.is_cut,
                        }
                        for n, damage in zip(batch, damages, strict=True)
                        if n not in done[strength]
                    )
        order = {strength: place for place, strength in enumerate(steerings)}
        rows = file.gather(
            lambda row: (order.get(row["strength"], len(order)), row["text"]), "reading plain text"
        )
    perplexity, divergence = {}, {}
    for strength in steerings:
        chosen = [row for row in rows if row["strength"] == strength]
        n_tokens = sum(row["n_tokens"] for row in chosen)
        if n_tokens:
            total = sum(row["log_likelihood"] for row in chosen)
            perplexity[strength] = float(np.exp(-total / n_tokens))
            divergence[strength] = sum(row["divergence"] for row in chosen) / n_tokens
    unsteered = [row for row in rows if row["strength"] == 0]
    return Damage(perplexity, divergence, len(unsteered), sum(row["is_cut"] for row in unsteered))
