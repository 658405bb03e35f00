"""Recursive Feature Machines, without ever forming a width x width matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from typing_extensions import Self

from expertsteer.arrays import Array, as_labels, as_states, like
from expertsteer.directions.base import DirectionFinder, require_variation
from expertsteer.errors import DataError, ParameterError

__all__ = ["NoGradientError", "RecursiveFeatureMachine"]

# Below this distance two points count as one and exert no gradient on each other.
_SAME_POINT = 1e-10
# Memory for a batch of layers on a GPU, and the n x n matrices that are there at once.
_BATCH_BYTES = 1 << 30
_MATRICES = 10


class NoGradientError(DataError):
    """The bandwidth is so small that every point stands alone."""

    def __init__(self, bandwidth: float) -> None:
        super().__init__(
            f"Got states on which bandwidth={bandwidth} leaves no gradient, but expected one. "
            "Choose a larger bandwidth, or bandwidth_mode='adaptive'."
        )


@dataclass(frozen=True)
class _Machine:
    """What training leaves of one layer."""

    mean: torch.Tensor
    points: torch.Tensor
    offset: torch.Tensor
    carry: torch.Tensor
    length: torch.Tensor
    alpha: torch.Tensor
    eigenvalues: torch.Tensor
    directions: torch.Tensor


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
    bandwidth_mode : {"adaptive", "constant"}, default="adaptive"
        "constant" takes L in the units of the states (after the metric), as the paper
        does. "adaptive" takes it in multiples of the median distance, anew in every
        round, so that the same L suits layers whose norms differ by orders of magnitude.
    ridge : float, default=1.0
        λ of the regression. The usual 1e-3 fits wrong labels as well as right ones.
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
        bandwidth_mode: str = "adaptive",
        ridge: float = 1.0,
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

    def fit_layers(self, X: Array, y: Array) -> list[Self]:  # noqa: N803
        """Find a direction in each of many layers; see `DirectionFinder.fit_layers`."""
        fitted = []
        for machine in self.try_layers(X, y):
            if machine is None:
                raise NoGradientError(self.bandwidth)
            fitted.append(machine)
        return fitted

    def try_layers(self, X: Array, y: Array) -> list[Self | None]:  # noqa: N803
        """Find a direction in each layer whose states leave a gradient.

        Parameters
        ----------
        X, y : arrays of shape (n, n_layers, width) and (n,)
            As `fit_layers` takes them.

        Returns
        -------
        list of RecursiveFeatureMachine or None
            A fitted copy a layer; None where the bandwidth leaves no gradient.
        """
        self._check_parameters()
        states = as_states("X", X, ndim=3).movedim(1, 0)
        labels = as_labels(y, states.shape[1]).to(states.device)
        for layer in states:
            require_variation(layer)
        fitted: list[Self | None] = []
        for batch in states.split(_layers_at_once(states)):
            for layer, machine in zip(batch, self._train(batch, labels), strict=True):
                if machine is None:
                    fitted.append(None)
                    continue
                copy = self.unfitted()
                fitted.append(copy._finish(copy._take(machine), layer, labels, X))
        return fitted

    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        (machine,) = self._train(states[None], labels)
        if machine is None:
            raise NoGradientError(self.bandwidth)
        return self._take(machine)

    def _take(self, machine: _Machine) -> torch.Tensor:
        self._machine = machine
        self.eigenvalues_ = machine.eigenvalues.cpu().numpy()
        return machine.directions

    def _train(self, states: torch.Tensor, labels: torch.Tensor) -> list[_Machine | None]:
        """Train a machine a layer; states are (n_layers, n, width)."""
        # Distances do not see the mean, but small differences of large numbers do.
        means = states.mean(1)
        points = states - means[:, None]
        offset = labels.mean() if self.center else torch.zeros_like(labels[0])
        targets = (labels - offset).double()
        gram = (points @ points.mT).double()

        # X M^{1/2} enters only through its Gram matrix X M X^T; G = B X and M = G^T G / scale.
        features, combination, projected, scale = gram, gram, gram, gram
        for iteration in range(self.n_iterations):
            distances, kernel, length = self._kernel(features)
            alpha = self._regress(kernel, targets)
            pull = torch.where(distances < _SAME_POINT, 0.0, kernel / distances)
            pull = pull * alpha[:, None] / length
            # Row k of A X is sum_i pull_ki (x_i - x_k), the gradient before the metric.
            step = pull - torch.diag_embed(pull.sum(-1))
            # Times M = X^T B^T B X / scale from the right, in coordinates of X.
            combination = step @ projected @ combination / scale if iteration else step
            projected = gram @ combination.mT
            if self.bandwidth_mode == "adaptive":
                # The median divides any scale out again, so the cheapest will do: the trace.
                scale = (combination * projected.mT).sum((1, 2), keepdim=True)
            else:
                scale = _largest_entry(combination, points)
            # Left on its device: a question in every round would have the CPU wait for a GPU.
            scale = torch.where(scale > 0, scale, 1.0)
            features = projected @ projected.mT / scale

        _, kernel, length = self._kernel(features)
        alpha = self._regress(kernel, targets)
        largest = _largest_entry(combination, points)
        # M = G^T G has the eigenvalues of G G^T = B (X X^T) B^T, and eigenvectors G^T u.
        values, vectors = torch.linalg.eigh(
            combination @ projected / torch.where(largest > 0, largest, 1.0)
        )
        k = min(self.n_directions, values.shape[1])
        leading = vectors.flip(2)[:, :, :k]
        directions = (leading.mT @ combination).float() @ points
        return [
            _Machine(
                mean=means[layer],
                points=points[layer],
                offset=offset,
                # ||x - z||_M = ||G (x - z)||: carries both to n coordinates.
                carry=combination[layer] / scale[layer].sqrt(),
                length=length[layer],
                alpha=alpha[layer],
                eigenvalues=values[layer].flip(0)[:k].float(),
                directions=directions[layer],
            )
            if has_gradient
            else None
            for layer, has_gradient in enumerate((largest > 0).flatten().tolist())
        ]

    def _kernel(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return distances, kernel and kernel length from Gram matrices, (n_layers, n, n)."""
        squares = features.diagonal(dim1=1, dim2=2)
        distances = squares[:, :, None] + squares[:, None] - 2 * features
        distances = distances.clamp_min_(0).sqrt_()
        distances.diagonal(dim1=1, dim2=2).zero_()
        length = torch.full_like(distances[:, :1, :1], self.bandwidth)
        if self.bandwidth_mode == "adaptive":
            n = distances.shape[1]
            rows, columns = torch.triu_indices(n, n, 1, device=distances.device)
            medians = distances[:, rows, columns].median(1).values
            length = length * medians.clamp_min(_SAME_POINT)[:, None, None]
        return distances, torch.exp(-distances / length), length

    def _regress(self, kernel: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        regularised = kernel.clone()
        regularised.diagonal(dim1=1, dim2=2).add_(self.ridge)
        factor = torch.linalg.cholesky(regularised)
        right = targets[:, None].expand(len(kernel), -1, 1)
        return torch.cholesky_solve(right, factor)[..., 0]

    def predict(self, X: Array) -> Array:  # noqa: N803
        """Return the kernel machine's own output, about -1 to +1.

        Parameters
        ----------
        X : array of shape (m, width)

        Returns
        -------
        array of shape (m,)
        """
        machine = self._machine
        states = as_states("X", X, min_rows=1).to(machine.points.device) - machine.mean
        new = (states @ machine.points.T).double() @ machine.carry.T
        old = (machine.points @ machine.points.T).double() @ machine.carry.T
        kernel = torch.exp(-torch.cdist(new, old) / machine.length)
        return like((kernel @ machine.alpha + machine.offset).float(), X)


def _largest_entry(combination: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the largest entries of G^T G for G = B X, shape (n_layers, 1, 1)."""
    # The largest entry of a Gram matrix lies on its diagonal.
    columns = (combination.float() @ points).square().sum(1)
    return columns.amax(1).double()[:, None, None]


def _layers_at_once(states: torch.Tensor) -> int:
    """Return how many layers to train in one batch; states are (n_layers, n, width)."""
    if states.device.type == "cpu":
        # One problem keeps all cores busy, and several at once leave the cache.
        return 1
    n = states.shape[1]
    return max(1, _BATCH_BYTES // (_MATRICES * 8 * n * n))
