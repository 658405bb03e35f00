"""Affine maps between the widths of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from typing_extensions import Self

__all__ = ["Affine", "encoder_tensors", "encoders_from"]


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine map h -> h W + b, with W a product of thin factors until it is asked for.

    States are as a rule fewer than their widths, and so is the rank of what is fitted to
    them: factor by factor a map of n states costs O(n^2 (d_in + d_out)), while W alone has
    d_in d_out entries.

    Attributes
    ----------
    factors : tuple of Tensor
        Matrices whose product is W, (d_in, d_out).
    bias : Tensor of shape (d_out,)
        b.

    Notes
    -----
    Source: this project.
    """

    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor

    @property
    def widths(self) -> tuple[int, int]:
        """d_in and d_out."""
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    @cached_property
    def weight(self) -> torch.Tensor:
        """W, (d_in, d_out), float32; formed when first asked for, in the cheapest order."""
        factors = [factor.float() for factor in self.factors]
        return torch.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, (n, d_in), in the precision of the factors; the result is float32."""
        rows = self.linear(states.to(self.bias.dtype))
        return (rows + self.bias.to(rows)).float()

    def linear(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows W, without the bias, in the precision and on the device of the rows."""
        for factor in self.factors:
            rows = rows @ factor.to(rows)
        return rows

    def then(self, other: Affine) -> Affine:
        """Return the map that does this one first."""
        return Affine((*self.factors, *other.factors), other.linear(self.bias) + other.bias)

    def to(self, device: torch.device | str) -> Self:
        """Return the map on a device."""
        factors = tuple(factor.to(device) for factor in self.factors)
        return type(self)(factors, self.bias.to(device))

    def single(self) -> Self:
        """Return the map in float32, by its weight where its factors are twice as large."""
        single = type(self)(tuple(factor.float() for factor in self.factors), self.bias.float())
        if sum(factor.numel() for factor in single.factors) > 2 * math.prod(self.widths):
            return type(self)((single.weight,), single.bias)
        return single


def encoder_tensors(encoders: Mapping[tuple[int, int], Affine]) -> dict[str, torch.Tensor]:
    """Return encoders as tensors to save, ``encoder.I.J.weight`` and ``.bias``, float32."""
    tensors = {}
    for (i, j), encoder in encoders.items():
        tensors[f"encoder.{i}.{j}.weight"] = encoder.weight
        tensors[f"encoder.{i}.{j}.bias"] = encoder.bias.float()
    return tensors


def encoders_from(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[int, int], Affine]:
    """Return the encoders among saved tensors, see `encoder_tensors`."""
    encoders = {}
    for name, weight in tensors.items():
        parts = name.split(".")
        if parts[0] == "encoder" and parts[-1] == "weight":
            pair = (int(parts[1]), int(parts[2]))
            encoders[pair] = Affine((weight,), tensors[f"encoder.{pair[0]}.{pair[1]}.bias"])
    return encoders
