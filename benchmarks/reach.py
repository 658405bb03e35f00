"""What the machine reaches: products of two matrices, and of one row with a large matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

KINDS = ("float32", "float64", "weights")


class Reach(NamedTuple):
    """A way to reach as much as possible of something, and how much of it that is.

    Attributes
    ----------
    run : callable
    amount : float
        Operations, or bytes read.
    """

    run: Callable[[], Any]
    amount: float


def reach(kind: str, n: int = 2048) -> Reach:
    """Return the way for "float32" or "float64" operations, or for bytes of "weights".

    The last is a product of one row with a matrix, which is what writing one token is.
    """
    if kind == "weights":
        row, matrix = torch.ones(1, 4 * n), torch.ones(4 * n, 4 * n)
        return Reach(lambda: row @ matrix, 4.0 * (4 * n) ** 2)
    square = torch.ones(n, n, dtype=getattr(torch, kind))
    return Reach(lambda: square @ square, 2.0 * n**3)
