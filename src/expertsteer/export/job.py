"""What every format is given to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack

__all__ = ["ExportJob"]


@dataclass(frozen=True)
class ExportJob:
    """A pack at one strength, ready to be written.

    Attributes
    ----------
    pack : SteeringPack
    strength : float
        Relative to the mean residual norm.
    vectors : dict of int to Tensor of shape (width,)
        What is added to the residual stream behind each 0-based block, float32.
    target : LanguageModel or None
        The model, for formats that hold or describe its weights.
    overwrite : bool
        Whether a folder may take the place of one that holds something.
    """

    pack: SteeringPack
    strength: float
    vectors: dict[int, torch.Tensor]
    target: LanguageModel | None = None
    overwrite: bool = False

    @property
    def language_model(self) -> LanguageModel:
        """The target, for formats that ask for it."""
        assert self.target is not None  # loaded wherever a format asks for it
        return self.target

    def summary(self) -> dict[str, Any]:
        """Return what was exported, without the vectors, as JSON types."""
        return {"exported_strength": self.strength} | self.pack.summary()
