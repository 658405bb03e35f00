"""What choosing and answering have in common: how questions are drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from expertsteer.errors import ParameterError

__all__ = ["draw_questions"]

_T = TypeVar("_T")


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
