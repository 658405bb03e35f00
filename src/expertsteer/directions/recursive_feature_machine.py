"""Recursive Feature Machines, without ever forming a width x width matrix."""

from __future__ import annotations

import math

import torch

from expertsteer.arrays import Array, as_states, like
from expertsteer.directions.base import DirectionFinder
from expertsteer.errors import DataError, ParameterError

__all__ = ["NoGradientError", "RecursiveFeatureMachine"]

# Below this distance two points count as one and exert no gradient on each other.
_SAME_POINT = 1e-10


class NoGradientError(DataError):
    """The bandwidth is so small that every point stands alone."""


class RecursiveFeatureMachine(DirectionFinder):
    r"""The top eigenvector of a Recursive Feature Machine's metric.

    Kernel ridge regression of the labels with a Mahalanobis-Laplacian kernel
    :math:`K_M(x, z) = \exp(-\|x - z\|_M / L)`; the average gradient outer product of the
    fit becomes the metric M of the next round.

    The gradients of n points are an n x d matrix G = B X with an n x n matrix B, and
    M = G^T G up to scale. Distances, the next gradients and the eigenvectors of M then
    all follow from the Gram matrix X X^T: one round costs O(n^3 + n^2 d) instead of
    O(n d^2 + d^3), and no d x d matrix exists.

    Parameters
    ----------
    bandwidth : float, default=10.0
        L, see ``bandwidth_mode``.
    bandwidth_mode : {"constant", "adaptive"}, default="constant"
        "constant" takes L in the units of the states (after the metric), as the paper
        does. "adaptive" takes it in multiples of the median distance, anew in every
        round, so that the same L suits layers whose norms differ by orders of magnitude.
    ridge : float, default=1e-3
        λ of the regression.
    n_iterations : int, default=5
        Rounds T; the usual range is 5 to 10.
    center : bool, default=True
        Subtract the mean label. (The mean state drops out of all distances.)
    n_directions : int, default=1
        How many leading eigenvectors to keep in ``directions_``.

    Attributes
    ----------
    direction_ : array of shape (width,)
        Unit top eigenvector, oriented by the labels.
    directions_ : array of shape (n_directions, width)
        Leading eigenvectors.
    eigenvalues_ : array of shape (n_directions,)
        Their eigenvalues, with M scaled so that its largest entry is 1.

    Notes
    -----
    Source: ExpertSteer (arXiv 2505.12313), step 3; Radhakrishnan et al. 2024; the low-rank
    form: this project.

    Examples
    --------
    >>> import numpy as np
    >>> from expertsteer.directions import RecursiveFeatureMachine
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 32)).astype("float32")
    >>> y = np.sign(X[:, 3])
    >>> rfm = RecursiveFeatureMachine().fit(X, y)
    >>> int(np.abs(rfm.direction_).argmax())
    3
    """

    def __init__(
        self,
        bandwidth: float = 10.0,
        bandwidth_mode: str = "constant",
        ridge: float = 1e-3,
        n_iterations: int = 5,
        center: bool = True,
        n_directions: int = 1,
    ) -> None:
        self.bandwidth = bandwidth
        self.bandwidth_mode = bandwidth_mode
        self.ridge = ridge
        self.n_iterations = n_iterations
        self.center = center
        self.n_directions = n_directions

    def _check_parameters(self) -> None:
        if self.bandwidth_mode not in ("constant", "adaptive"):
            raise ParameterError(
                f"Got bandwidth_mode={self.bandwidth_mode!r}, but expected 'constant' or "
                "'adaptive'."
            )
        for name in ("bandwidth", "ridge"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ParameterError(f"Got {name}={value}, but expected a positive finite number.")
        for name in ("n_iterations", "n_directions"):
            value = getattr(self, name)
            if value < 1:
                raise ParameterError(f"Got {name}={value}, but expected at least 1.")

    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Distances do not see the mean, but small differences of large numbers do.
        self._mean = states.mean(0)
        points = states - self._mean
        offset = labels.mean() if self.center else torch.zeros_like(labels[0])
        targets = (labels - offset).double()
        gram = (points @ points.T).double()

        features = gram  # X M^{1/2} enters only through its Gram matrix X M X^T
        combination = None  # B, with G = B X and M = G^T G / scale
        scale = torch.ones((), dtype=torch.float64, device=states.device)
        for _ in range(self.n_iterations):
            distances, kernel = self._kernel(features)
            alpha = self._regress(kernel, targets)
            pull = torch.where(distances < _SAME_POINT, 0.0, kernel / distances)
            pull = pull * alpha / self._length
            # Row k of A X is sum_i pull_ki (x_i - x_k), the gradient before the metric.
            step = pull - torch.diag(pull.sum(1))
            if combination is None:
                combination = step
            else:
                # Times M = X^T B^T B X / scale from the right, in coordinates of X.
                combination = step @ (gram @ combination.T) @ combination / scale
            # The largest entry of a Gram matrix lies on its diagonal.
            columns = (combination.float() @ points).square().sum(0)
            scale = columns.max().double()
            if not bool(scale > 0):
                raise NoGradientError(
                    f"Got states on which bandwidth={self.bandwidth} leaves no gradient, but "
                    "expected one. Choose a larger bandwidth, or bandwidth_mode='adaptive'."
                )
            projected = gram @ combination.T
            features = projected @ projected.T / scale

        assert combination is not None
        _, kernel = self._kernel(features)
        self._points, self._offset = points, offset
        self._combination, self._scale = combination, scale
        self._alpha = self._regress(kernel, targets)
        return self._leading_eigenvectors(gram, combination, scale, points)

    def _kernel(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        squares = features.diagonal()
        distances = squares[:, None] + squares - 2 * features
        distances = distances.clamp_min_(0).sqrt_()
        distances.fill_diagonal_(0)
        self._length: float | torch.Tensor = self.bandwidth
        if self.bandwidth_mode == "adaptive":
            n = len(distances)
            upper = distances[torch.triu_indices(n, n, 1, device=distances.device).unbind()]
            # Left on its device: a number would have the CPU wait for a GPU.
            self._length = self.bandwidth * upper.median().clamp_min(_SAME_POINT)
        return distances, torch.exp(-distances / self._length)

    def _regress(self, kernel: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        regularised = kernel.clone()
        regularised.diagonal().add_(self.ridge)
        factor = torch.linalg.cholesky(regularised)
        return torch.cholesky_solve(targets[:, None], factor)[:, 0]

    def _leading_eigenvectors(
        self,
        gram: torch.Tensor,
        combination: torch.Tensor,
        scale: torch.Tensor,
        points: torch.Tensor,
    ) -> torch.Tensor:
        # M = G^T G has the eigenvalues of G G^T = B (X X^T) B^T, and eigenvectors G^T u.
        values, vectors = torch.linalg.eigh(combination @ gram @ combination.T / scale)
        k = min(self.n_directions, len(values))
        self.eigenvalues_ = values.flip(0)[:k].float().cpu().numpy()
        leading = vectors.flip(1)[:, :k]
        return (leading.T @ combination).float() @ points

    def predict(self, X: Array) -> Array:  # noqa: N803
        """Return the kernel machine's own output, about -1 to +1.

        Parameters
        ----------
        X : array of shape (m, width)

        Returns
        -------
        array of shape (m,)
        """
        states = as_states("X", X, min_rows=1).to(self._points.device) - self._mean
        # ||x - z||_M = ||G (x - z)||, so both sides are carried to n coordinates by G.
        carry = self._combination / self._scale.sqrt()
        new = (states @ self._points.T).double() @ carry.T
        old = (self._points @ self._points.T).double() @ carry.T
        kernel = torch.exp(-torch.cdist(new, old) / self._length)
        return like((kernel @ self._alpha + self._offset).float(), X)
