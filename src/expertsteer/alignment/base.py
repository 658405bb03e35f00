"""What every alignment has in common: an affine encoder and an affine decoder."""

from __future__ import annotations

import abc
from collections.abc import Callable
from functools import cached_property, partial

import torch
from typing_extensions import Self

from expertsteer.affine import Affine
from expertsteer.alignment.linear import (
    ThinSVD,
    between_bases,
    ridge_decoder,
    thin_svd,
)
from expertsteer.arrays import Array, as_states, like
from expertsteer.errors import DataError, ParameterError
from expertsteer.estimator import Estimator

__all__ = ["Aligner", "PairedAligner"]


class Aligner(Estimator, abc.ABC):
    """Base of the alignments of one expert layer with one target layer.

    Subclasses solve for an encoder f(h) = h W + b from the expert's width to the
    target's, and a decoder back. `fit` first solves on part of the rows and measures
    on the others, then solves again on all of them, so that the reported figures are
    held-out ones and the encoder has seen everything.

    Attributes
    ----------
    encoder_ : Affine
        f, float32, by thin factors.
    encoder_weight_ : array of shape (d_expert, d_target)
        W, float32; formed when first asked for.
    encoder_bias_ : array of shape (d_target,)
        b, float32.
    decoder_weight_ : array of shape (d_target, d_expert)
        Weight of the decoder, float32.
    decoder_bias_ : array of shape (d_expert,)
        Bias of the decoder, float32.
    reconstruction_error_ : float
        Held-out mean of ||h_E - g(f(h_E))||^2 divided by the held-out variance of h_E:
        0 is perfect, 1 is as good as the mean.
    r2_ : float
        Held-out R^2 of f(h_E) against h_T; NaN where no target states were given.
    """

    # Share of the rows that only measure, at least two of them.
    _HOLDOUT = 0.2
    needs_target_states = True

    encoder_: Affine
    reconstruction_error_: float
    r2_: float

    def fit(
        self,
        expert_states: Array,
        target_states: Array | None = None,
        *,
        target_width: int | None = None,
    ) -> Self:
        """Fit the encoder and the decoder.

        Parameters
        ----------
        expert_states : array of shape (n, d_expert)
            States of the expert at one layer.
        target_states : array of shape (n, d_target), optional
            States of the target at one layer for the same texts, row by row. Alignments
            that never see the target (`AutoEncoder`) use it for its width and R^2 alone.
        target_width : int, optional
            Width to encode to where no target states are given.

        Returns
        -------
        self

        Raises
        ------
        DataError
            On states that are not finite, too few, or not paired.
        ParameterError
            On settings out of range.
        """
        self._check_parameters()
        expert = as_states("expert_states", expert_states, min_rows=5)
        target = None
        if target_states is not None:
            target = as_states("target_states", target_states, min_rows=5).to(expert.device)
            if len(target) != len(expert):
                raise DataError(
                    f"Got {len(expert)} expert states and {len(target)} target states, but "
                    "expected the same texts row by row."
                )
            target_width = target.shape[1]
        elif self.needs_target_states:
            raise DataError(
                f"Got no target states, but {type(self).__name__} is fitted to them. "
                "Pass target_states, or use AutoEncoder."
            )
        if target_width is None:
            raise ParameterError("Got neither target_states nor target_width, expected one.")

        encoder, self._find_decoder = self._fit(expert, target, target_width)
        self.encoder_ = encoder.single()
        self._kind = expert_states[:0]
        vars(self).pop("decoder_", None)
        return self

    @property
    def encoder_weight_(self) -> Array:
        """W, (d_expert, d_target), float32; formed when first asked for."""
        return like(self.encoder_.weight, self._kind)

    @property
    def encoder_bias_(self) -> Array:
        """b, (d_target,), float32."""
        return like(self.encoder_.bias, self._kind)

    @cached_property
    def decoder_(self) -> Affine:
        """g, float32, by thin factors; as dear as the encoder, so found when first asked for."""
        return self._find_decoder().single()

    @property
    def decoder_weight_(self) -> Array:
        """Weight of the decoder, (d_target, d_expert), float32; formed when first asked for."""
        return like(self.decoder_.weight, self._kind)

    @property
    def decoder_bias_(self) -> Array:
        """Bias of the decoder, (d_expert,), float32."""
        return like(self.decoder_.bias, self._kind)

    def encode(self, expert_states: Array) -> Array:
        """Carry expert states into the target's width: (n, d_expert) to (n, d_target)."""
        return _apply(self.encoder_, expert_states)

    def decode(self, encoded: Array) -> Array:
        """Carry encoded states back: (n, d_target) to (n, d_expert)."""
        return _apply(self.decoder_, encoded)

    def encode_direction(self, direction: Array) -> Array:
        """Carry a direction of the expert's space: the linear part of the encoder.

        Parameters
        ----------
        direction : array of shape (d_expert,)
            A steering vector made for the expert.

        Returns
        -------
        array of shape (d_target,)
            Not normalised.
        """
        vector = torch.as_tensor(direction).float()
        return like(self.encoder_.linear(vector), direction)

    def r2(self, expert_states: Array, target_states: Array) -> float:
        """Return R^2 of the encoded expert states against the target's states.

        Parameters
        ----------
        expert_states : array of shape (n, d_expert)
        target_states : array of shape (n, d_target)

        Returns
        -------
        float
            1 is perfect, 0 is as good as the mean; pooled over all dimensions.
        """
        target = as_states("target_states", target_states)
        encoded = torch.as_tensor(self.encode(expert_states)).to(target.device)
        return 1 - _unexplained(encoded, target)

    @abc.abstractmethod
    def _fit(
        self, expert: torch.Tensor, target: torch.Tensor | None, width: int
    ) -> tuple[Affine, Callable[[], Affine]]:
        """Measure on held-out rows; return the encoder, and a function that finds the decoder."""

    def _measure(
        self,
        encoder: Affine,
        decoder: Affine,
        expert: torch.Tensor,
        target: torch.Tensor | None,
    ) -> None:
        """Set the figures of an encoder and a decoder on rows that they have not seen."""
        encoded = encoder(expert)
        self.reconstruction_error_ = _unexplained(decoder(encoded), expert)
        self.r2_ = float("nan") if target is None else 1 - _unexplained(encoded, target)

    def _check_parameters(self) -> None:
        """Raise ParameterError on settings out of range."""

    def _holdout(self, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
        n_held = max(2, round(n_rows * self._HOLDOUT))
        return order[n_held:], order[:n_held]


class PairedAligner(Aligner):
    """Base of alignments that are fitted to paired states and solved in closed form.

    They are solved in principal coordinates, which no rotation of either model's states
    changes and which are as many as there are rows at most: whatever the widths, all that is
    as large as they are is decomposed once.
    """

    @abc.abstractmethod
    def _solve(self, expert: ThinSVD, target: ThinSVD) -> torch.Tensor:
        """Return the encoder's matrix from the one's principal coordinates to the other's."""

    def _fit(
        self, expert: torch.Tensor, target: torch.Tensor | None, width: int
    ) -> tuple[Affine, Callable[[], Affine]]:
        assert target is not None
        x, y = thin_svd(expert), thin_svd(target)
        train, held = self._holdout(len(expert))
        z, aimed = x.coordinates(), y.coordinates()
        part = thin_svd(z[train]), thin_svd(aimed[train])
        core = self._solve(*part)
        encoder = between_bases(part[0], core, part[1])
        decoder = _best_decoder(part[0], core, part[1])
        self._measure(encoder, decoder, z[held], aimed[held])
        core = self._solve(x, y)
        return between_bases(x, core, y), partial(_best_decoder, x, core, y)


def _apply(encoder: Affine, states: Array) -> Array:
    tensor = as_states("states", states, min_rows=1)
    width = encoder.widths[0]
    if tensor.shape[1] != width:
        raise DataError(
            f"Got states of width {tensor.shape[1]}, but expected {width}, the width this "
            "alignment was fitted on."
        )
    return like(encoder(tensor), states)


def _best_decoder(expert: ThinSVD, core: torch.Tensor, target: ThinSVD) -> Affine:
    """Return the best way back from what an encoder's matrix makes of the expert's states."""
    encoded = expert.coordinates() @ core
    # What float32 rounds off in the encoded states: no decoder may lean on less.
    size = (encoded.square().sum() + len(encoded) * target.mean.square().sum()).sqrt()
    rounded_off = float(size * torch.finfo(torch.float32).eps)
    back = ridge_decoder(thin_svd(encoded, least=rounded_off), expert)
    return target.to_coordinates().then(back)


def _unexplained(found: torch.Tensor, states: torch.Tensor) -> float:
    # A constant layer has no variation to explain; any error then counts in full.
    least = torch.finfo(torch.float32).tiny
    variation = (states - states.mean(0)).square().sum().clamp_min(least)
    return float((found - states).square().sum() / variation)
