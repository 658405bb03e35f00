"""Recursive Feature Machines, without ever forming a width x width matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from typing_extensions import Self

from expertsteer.arrays import Array, as_labels, as_states, like
from expertsteer.directions.base import DirectionFinder, require_variation
from expertsteer.errors import DataError, ParameterError
from expertsteer.gram import gram_matrix

__all__ = ["NoGradientError", "RecursiveFeatureMachine"]

# Below this distance two points count as one and exert no gradient on each other.
_SAME_POINT = 1e-10
# Share of the largest eigenvalue up to which float32 rounds an eigenvector away.
_NO_EIGENVALUE = 1e-8
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


class _Points(NamedTuple):
    """Layers' centred states with their means and Gram matrices, whatever the bandwidth."""

    means: torch.Tensor  # (n_layers, width)
    points: torch.Tensor  # (n_layers, n, width)
    gram: torch.Tensor  # (n_layers, n, n), float64

    @classmethod
    def of(cls, states: torch.Tensor) -> _Points:
        # Distances do not see the mean, but small differences of large numbers do.
        means = states.mean(1)
        points = states - means[:, None]
        return cls(means, points, gram_matrix(points).double())


@dataclass(frozen=True)
class _Machine:
    """What training leaves of one layer: G = B X, its products, and the last regression."""

    mean: torch.Tensor
    points: torch.Tensor  # X
    combination: torch.Tensor  # B
    projected: torch.Tensor  # X X^T B^T
    scale: torch.Tensor
    length: torch.Tensor
    alpha: torch.Tensor
    offset: torch.Tensor


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
        How many leading eigenvectors to keep in ``directions_``, at most: a strong ridge
        leaves a metric of rank one.

    Attributes
    ----------
    direction_ : array of shape (width,)
        Unit top eigenvector, oriented by the labels.
    directions_ : array of shape (k, width)
        Leading eigenvectors, k of them.
    eigenvalues_ : array of shape (k,)
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
        trained = [found.get(self.bandwidth) for found in self.train_layers(X, y, [self.bandwidth])]
        machines = [machine for machine in trained if machine is not None]
        if len(machines) < len(trained):
            raise NoGradientError(self.bandwidth)
        return self.finish_layers(machines, X, y)

    def train_layers(
        self,
        X: Array,  # noqa: N803
        y: Array,
        bandwidths: Sequence[float],
    ) -> list[dict[float, Self]]:
        """Train a machine a layer and bandwidth; directions are left to `finish_layers`.

        What the bandwidths share is computed once a layer, and only who is chosen among
        them needs directions.

        Parameters
        ----------
        X, y : arrays of shape (n, n_layers, width) and (n,)
            As `fit_layers` takes them.
        bandwidths : sequence of float
            In place of ``bandwidth``.

        Returns
        -------
        list of dict of float to RecursiveFeatureMachine, one a layer
            Copies that can `predict`, by bandwidth; one that leaves no gradient is missing.
        """
        candidates = {bandwidth: self.unfitted() for bandwidth in bandwidths}
        for bandwidth, candidate in candidates.items():
            candidate.bandwidth = bandwidth
            candidate._check_parameters()
        states = as_states("X", X, ndim=3).movedim(1, 0)
        labels = as_labels(y, states.shape[1]).to(states.device)
        for layer in states:
            require_variation(layer)
        trained: list[dict[float, Self]] = []
        for batch in states.split(_layers_at_once(states)):
            found: list[dict[float, Self]] = [{} for _ in batch]
            points = _Points.of(batch)
            for bandwidth, candidate in candidates.items():
                for by_bandwidth, machine in zip(
                    found, candidate._train(points, labels), strict=True
                ):
                    if machine is not None:
                        by_bandwidth[bandwidth] = candidate.unfitted()
                        by_bandwidth[bandwidth]._machine = machine
            trained += found
        return trained

    def finish_layers(self, trained: Sequence[Self], X: Array, y: Array) -> list[Self]:  # noqa: N803
        """Find the directions of trained machines.

        Parameters
        ----------
        trained : sequence of RecursiveFeatureMachine
            Of `train_layers`, one a layer.
        X, y : arrays of shape (n, n_layers, width) and (n,)
            What they were trained on.

        Returns
        -------
        list of RecursiveFeatureMachine
            The same, fitted.
        """
        states = as_states("X", X, ndim=3).movedim(1, 0)
        labels = as_labels(y, states.shape[1]).to(states.device)
        at_once = _layers_at_once(states)
        for first in range(0, len(trained), at_once):
            batch = trained[first : first + at_once]
            found = self._leading([finder._machine for finder in batch])
            for finder, layer, (values, directions) in zip(
                batch, states[first : first + at_once], found, strict=True
            ):
                finder.eigenvalues_ = values.cpu().numpy()
                finder._finish(directions, layer, labels, X)
        return list(trained)

    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        (machine,) = self._train(_Points.of(states[None]), labels)
        if machine is None:
            raise NoGradientError(self.bandwidth)
        self._machine = machine
        ((values, directions),) = self._leading([machine])
        self.eigenvalues_ = values.cpu().numpy()
        return directions

    def _train(self, given: _Points, labels: torch.Tensor) -> list[_Machine | None]:
        """Train a machine a layer; None where there is no gradient."""
        means, points, gram = given
        offset = labels.mean() if self.center else torch.zeros_like(labels[0])
        targets = (labels - offset).double()

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
            # X X^T B^T, of which the last round's X M X^T holds all but the new factor.
            projected = features @ step.mT
            if self.bandwidth_mode == "adaptive":
                # The median divides any scale out again, so the cheapest will do: the trace.
                scale = (combination * projected.mT).sum((1, 2), keepdim=True)
            else:
                scale = _largest_entry(combination, points)
            # Left on its device: a question in every round would have the CPU wait for a GPU.
            scale = torch.where(scale > 0, scale, 1.0)
            features = gram_matrix(projected) / scale

        _, kernel, length = self._kernel(features)
        alpha = self._regress(kernel, targets)
        # ||G||^2; below what float32 holds there is no direction to be had.
        traces = (combination * projected.mT).sum((1, 2))
        has_gradient = traces > torch.finfo(torch.float32).tiny
        return [
            _Machine(
                mean=means[layer],
                points=points[layer],
                combination=combination[layer],
                projected=projected[layer],
                scale=scale[layer],
                length=length[layer],
                alpha=alpha[layer],
                offset=offset,
            )
            if has
            else None
            for layer, has in enumerate(has_gradient.tolist())
        ]

    def _leading(self, machines: Sequence[_Machine]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a layer's leading eigenvalues of M, (k,), and eigenvectors, (k, width)."""
        points = torch.stack([machine.points for machine in machines])
        combination = torch.stack([machine.combination for machine in machines])
        projected = torch.stack([machine.projected for machine in machines])
        # M = G^T G has the eigenvalues of G G^T = B (X X^T) B^T, and eigenvectors G^T u.
        values, vectors = torch.linalg.eigh(
            combination @ projected / _largest_entry(combination, points)
        )
        leading = vectors.flip(2)[:, :, : self.n_directions]
        directions = (leading.mT @ combination).float() @ points
        values = values.flip(1)[:, : self.n_directions]
        kept = (values > _NO_EIGENVALUE * values[:, :1]).sum(1).tolist()
        return [(values[layer, :k].float(), directions[layer, :k]) for layer, k in enumerate(kept)]

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
        # ||x - z||_M = ||G (x - z)||: everything in n coordinates.
        new = (states @ machine.points.T).double() @ machine.combination.T
        distances = torch.cdist(new, machine.projected) / machine.scale.sqrt()
        kernel = torch.exp(-distances / machine.length)
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
