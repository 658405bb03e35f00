"""What a file of somebody else's holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["FileVectors"]


@dataclass(frozen=True)
class FileVectors:
    """Vectors as another program adds them.

    Attributes
    ----------
    format : str
    vectors : dict of int to Tensor
        What is added to the output of each 0-based block at the other program's scale 1.
    model_type : str or None
        Which architecture the file says it is for.
    """

    format: str
    vectors: dict[int, torch.Tensor]
    model_type: str | None
