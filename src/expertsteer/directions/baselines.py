"""Directions that other work steers with, behind the same face."""

from __future__ import annotations

import math

import torch
from sklearn.linear_model import LogisticRegression

from expertsteer.arrays import Array, as_states, like
from expertsteer.directions.base import DirectionFinder
from expertsteer.errors import ParameterError

__all__ = ["LogisticProbe", "MeanDifference", "PrincipalComponent"]


class MeanDifference(DirectionFinder):
    """Mean of the positive states minus mean of the negative ones.

    Notes
    -----
    Source: contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681).
    """

    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (states[labels > 0].mean(0) - states[labels < 0].mean(0))[None]


class PrincipalComponent(DirectionFinder):
    """First principal component of differences between positive and negative states.

    Positive and negative rows are paired in the order in which they come; where one
    class has more rows, the rest of it is left out.

    Parameters
    ----------
    n_directions : int, default=1
        How many components to keep.

    Attributes
    ----------
    eigenvalues_ : array of shape (n_directions,)
        Variance of the differences along each.

    Notes
    -----
    Source: representation engineering (Zou et al. 2023, arXiv 2310.01405), the "LAT" reader:
    the signs of the differences alternate, so that their mean does not drop out.
    """

    def __init__(self, n_directions: int = 1) -> None:
        self.n_directions = n_directions

    def _check_parameters(self) -> None:
        if self.n_directions < 1:
            raise ParameterError(f"Got n_directions={self.n_directions}, but expected at least 1.")

    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positive, negative = states[labels > 0], states[labels < 0]
        n = min(len(positive), len(negative))
        differences = positive[:n] - negative[:n]
        # Alternating signs make the mean difference a direction of variance.
        _, s, vt = torch.linalg.svd(differences, full_matrices=False)
        k = min(self.n_directions, len(s))
        self.eigenvalues_ = (s[:k].square() / n).cpu().numpy()
        return vt[:k]


class LogisticProbe(DirectionFinder):
    """Normal of a logistic regression, in the states' own coordinates.

    Parameters
    ----------
    inverse_strength : float, default=1.0
        C of scikit-learn's regression, on states scaled to unit mean variance.

    Attributes
    ----------
    probe_ : LogisticRegression
        The fitted regression.

    Notes
    -----
    Source: inference-time intervention (Li et al. 2023, arXiv 2306.03341) uses probes so.
    """

    def __init__(self, inverse_strength: float = 1.0) -> None:
        self.inverse_strength = inverse_strength

    def _check_parameters(self) -> None:
        if not (math.isfinite(self.inverse_strength) and self.inverse_strength > 0):
            raise ParameterError(
                f"Got inverse_strength={self.inverse_strength}, but expected a positive finite "
                "number."
            )

    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self._mean = states.mean(0)
        self._scale = (states - self._mean).square().mean().sqrt()
        scaled = ((states - self._mean) / self._scale).cpu().numpy()
        self.probe_ = LogisticRegression(C=self.inverse_strength, max_iter=1000)
        self.probe_.fit(scaled, labels.cpu().numpy())
        return torch.from_numpy(self.probe_.coef_).float().to(states.device)

    def predict(self, X: Array) -> Array:  # noqa: N803
        """Return the log-odds of the wanted behaviour, shape (m,)."""
        states = as_states("X", X, min_rows=1).to(self._mean.device)
        scaled = ((states - self._mean) / self._scale).cpu().numpy()
        return like(torch.from_numpy(self.probe_.decision_function(scaled)).float(), X)
