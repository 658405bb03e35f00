"""What choosing, answering and continuing have in common: how questions are drawn and batched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from expertsteer.errors import ParameterError

__all__ = ["QuestionBatch", "draw_questions", "in_batches"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class QuestionBatch(Generic[_T]):
    """Questions that a model reads together, whoever asks them and whatever is done already.

    Attributes
    ----------
    questions : tuple
    start : int
        How many questions the batches before it hold.
    """

    questions: tuple[_T, ...]
    start: int


def in_batches(
    questions: Sequence[_T], lengths: Sequence[int], batch_size: int
) -> list[QuestionBatch[_T]]:
    """Put a number of questions of similar length together, longest first."""
    order = sorted(range(len(questions)), key=lambda n: lengths[n], reverse=True)
    return [
        QuestionBatch(tuple(questions[n] for n in order[start : start + batch_size]), start)
        for start in range(0, len(order), batch_size)
    ]


def draw_questions(questions: Sequence[_T], limit: int | None, rng: random.Random) -> list[_T]:
    """Return at most ``limit`` questions, drawn at random and in their order.

    Raises
    ------
    ParameterError
        If the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ParameterError(f"Got limit={limit}, but expected at least 1.")
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[place] for place in sorted(rng.sample(range(len(questions)), limit))]
