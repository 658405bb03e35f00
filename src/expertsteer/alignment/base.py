"""What every alignment has in common: an affine encoder and an affine decoder."""

from __future__ import annotations

import abc

import torch
from typing_extensions import Self

from expertsteer.alignment.linear import Affine, ThinSVD, ridge_decoder, thin_svd
from expertsteer.arrays import Array, as_states, like
from expertsteer.errors import DataError, ParameterError
from expertsteer.estimator import Estimator

__all__ = ["Aligner"]


class Aligner(Estimator, abc.ABC):
    """Base of the alignments of one expert layer with one target layer.

    Subclasses solve for an encoder f(h) = h W + b from the expert's width to the
    target's, and a decoder back. `fit` first solves on part of the rows and measures
    on the others, then solves again on all of them, so that the reported figures are
    held-out ones and the encoder has seen everything.

    Attributes
    ----------
    encoder_weight_ : array of shape (d_expert, d_target)
        W, float32.
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

    encoder_weight_: Array
    encoder_bias_: Array
    decoder_weight_: Array
    decoder_bias_: Array
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

        train, held = self._holdout(len(expert))
        # The widest products are those of the weights, which the held-out rows do not need.
        encoder, decoder = self._solve(expert[train], _rows(target, train), target_width)
        encoded = encoder(expert[held])
        self.reconstruction_error_ = _unexplained(decoder(encoded), expert[held])
        self.r2_ = float("nan") if target is None else 1 - _unexplained(encoded, target[held])
        encoder, decoder = self._solve(expert, target, target_width)
        self.encoder_weight_ = like(encoder.weight(), expert_states)
        self.encoder_bias_ = like(encoder.bias.float(), expert_states)
        self.decoder_weight_ = like(decoder.weight(), expert_states)
        self.decoder_bias_ = like(decoder.bias.float(), expert_states)
        return self

    def encode(self, expert_states: Array) -> Array:
        """Carry expert states into the target's width: (n, d_expert) to (n, d_target)."""
        return self._apply(expert_states, self.encoder_weight_, self.encoder_bias_)

    def decode(self, encoded: Array) -> Array:
        """Carry encoded states back: (n, d_target) to (n, d_expert)."""
        return self._apply(encoded, self.decoder_weight_, self.decoder_bias_)

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
        return like(vector @ torch.as_tensor(self.encoder_weight_).to(vector.device), direction)

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
    def _solve(
        self, expert: torch.Tensor, target: torch.Tensor | None, width: int
    ) -> tuple[Affine, Affine]:
        """Return encoder and decoder."""

    def _check_parameters(self) -> None:
        """Raise ParameterError on settings out of range."""

    def _holdout(self, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
        n_held = max(2, round(n_rows * self._HOLDOUT))
        return order[n_held:], order[:n_held]

    def _apply(self, states: Array, weight: Array, bias: Array) -> Array:
        tensor = as_states("states", states, min_rows=1)
        if tensor.shape[1] != weight.shape[0]:
            raise DataError(
                f"Got states of width {tensor.shape[1]}, but expected {weight.shape[0]}, the width "
                "this alignment was fitted on."
            )
        weight, bias = (torch.as_tensor(part).to(tensor.device) for part in (weight, bias))
        return like(torch.addmm(bias, tensor, weight), states)


class EncoderOnly(Aligner):
    """Base of alignments that solve for the encoder; the decoder is a ridge regression."""

    @abc.abstractmethod
    def _solve_encoder(self, expert: ThinSVD, target: torch.Tensor) -> Affine:
        """Return the encoder."""

    def _solve(
        self, expert: torch.Tensor, target: torch.Tensor | None, width: int
    ) -> tuple[Affine, Affine]:
        assert target is not None
        svd = thin_svd(expert)
        encoder = self._solve_encoder(svd, target)
        return encoder, ridge_decoder(thin_svd(encoder(expert)), svd)


def _rows(states: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if states is None else states[index]


def _unexplained(found: torch.Tensor, states: torch.Tensor) -> float:
    # A constant layer has no variation to explain; any error then counts in full.
    least = torch.finfo(torch.float32).tiny
    variation = (states - states.mean(0)).square().sum().clamp_min(least)
    return float((found - states).square().sum() / variation)
