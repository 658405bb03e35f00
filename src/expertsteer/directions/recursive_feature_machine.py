"""Recursive Feature Machines, without ever forming a width x width matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple, TypeVar

import numpy as np
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
    """What training leaves of one layer: G = B X, its products, and the last regression.

    A round has B = A P B' / scale, with the gradients' coefficients A before the metric and the
    last round's B' and P = X X^T B'^T. What the rounds go on from needs no B, so it is left as
    its factors, and formed for machines whose direction is wanted.
    """

    mean: torch.Tensor
    points: torch.Tensor  # X
    factors: tuple[torch.Tensor, ...]  # whose product is B
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

    eigenvalues_: np.ndarray
    _machine: _Machine

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
        found = self.search_layers(X, y, [self.bandwidth], lambda _layer, _machine: 0.0)
        return [finder for finder, _ in found]

    def search_layers(
        self,
        X: Array,  # noqa: N803
        y: Array,
        bandwidths: Sequence[float],
        score: Callable[[int, Self], float],
    ) -> list[tuple[Self, dict[float, float]]]:
        """Find a direction in each of many layers, with the bandwidth that scores best there.

        What the bandwidths share is computed once a layer, and directions are found for the
        chosen ones alone.

        Parameters
        ----------
        X, y : arrays of shape (n, n_layers, width) and (n,)
            As `fit_layers` takes them.
        bandwidths : sequence of float
            In place of ``bandwidth``.
        score : callable
            Of the place of a layer and a machine that can `predict` and has no direction yet;
            the highest is taken, the first one on ties.

        Returns
        -------
        list of (RecursiveFeatureMachine, dict of float to float), one a layer
            Fitted; and the scores by bandwidth. One that leaves no gradient is missing there.

        Raises
        ------
        DataError
            If no bandwidth leaves a gradient in some layer.
        """
        candidates = [self.unfitted().set_params(bandwidth=value) for value in bandwidths]
        for candidate in candidates:
            candidate._check_parameters()
        states = as_states("X", X, ndim=3).movedim(1, 0)
        labels = as_labels(y, states.shape[1]).to(states.device)
        for layer in states:
            require_variation(layer)
        found: list[tuple[Self, dict[float, float]]] = []
        n_kept = 2 * self.n_iterations * len(bandwidths)
        for batch in states.split(_layers_at_once(states, n_kept)):
            chosen = _best_machines(candidates, batch, labels, score, len(found))
            finders = [finder for finder, _ in chosen]
            for finder, layer, directions in zip(finders, batch, _lead(finders), strict=True):
                finder._finish(directions, layer, labels, X)
            found += chosen
        return found

    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        (machine,) = self._train(_Points.of(states[None]), labels)
        if machine is None:
            raise NoGradientError(self.bandwidth)
        self._machine = machine
        return _lead([self])[0]

    def _train(self, given: _Points, labels: torch.Tensor) -> list[_Machine | None]:
        """Train a machine a layer; None where there is no gradient."""
        means, points, gram = given
        offset = labels.mean() if self.center else torch.zeros_like(labels[0])
        targets = (labels - offset).double()

        # X M^{1/2} enters only through its Gram matrix X M X^T; G = B X and M = G^T G / scale.
        features, projected, scale = gram, gram, gram
        slopes = gram.new_zeros(len(gram))
        factors: list[torch.Tensor] = []
        for _ in range(self.n_iterations):
            distances, kernel, length = self._kernel(features)
            alpha = self._regress(kernel, targets)
            pull = torch.where(distances < _SAME_POINT, 0.0, kernel / distances)
            pull = pull * alpha[:, None] / length
            # Row k of A X is sum_i pull_ki (x_i - x_k), the gradient before the metric.
            step = pull - torch.diag_embed(pull.sum(-1))
            # Times M = X^T B^T B X / scale from the right, in coordinates of X.
            factors = [step, projected / scale, *factors] if factors else [step]
            # X X^T B^T, of which the last round's X M X^T holds all but the new factor.
            projected = features @ step.mT
            # ||A X M^{1/2}||^2
            slopes = (step * projected.mT).sum((1, 2))
            features = gram_matrix(projected)
            if self.bandwidth_mode == "adaptive":
                # The median divides any scale out again, so the cheapest will do: the trace.
                scale = features.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            else:
                factors = [_product(factors)]
                scale = _largest_entry(factors[0], points)
            # Left on its device: a question in every round would have the CPU wait for a GPU.
            scale = torch.where(scale > 0, scale, 1.0)
            features = features / scale

        _, kernel, length = self._kernel(features)
        alpha = self._regress(kernel, targets)
        # Below what float32 holds there is no direction to be had.
        has_gradient = slopes > torch.finfo(torch.float32).tiny
        return [
            _Machine(
                mean=means[layer],
                points=points[layer],
                factors=tuple(factor[layer] for factor in factors),
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
        new = (states @ machine.points.T).double()
        for factor in reversed(machine.factors):
            new = new @ factor.T
        distances = torch.cdist(new, machine.projected) / machine.scale.sqrt()
        kernel = torch.exp(-distances / machine.length)
        return like((kernel @ machine.alpha + machine.offset).float(), X)


_Finder = TypeVar("_Finder", bound=RecursiveFeatureMachine)


def _best_machines(
    candidates: Sequence[_Finder],
    batch: torch.Tensor,
    labels: torch.Tensor,
    score: Callable[[int, _Finder], float],
    first: int,
) -> list[tuple[_Finder, dict[float, float]]]:
    """Return the candidate whose machine scores best in each layer, and all scores.

    ``first`` is the place of the batch's first layer among all.
    """
    points = _Points.of(batch)
    best: dict[int, _Finder] = {}
    scores: list[dict[float, float]] = [{} for _ in batch]
    for candidate in candidates:
        for place, machine in enumerate(candidate._train(points, labels)):
            if machine is None:
                continue
            finder = candidate.unfitted()
            finder._machine = machine
            scored = score(first + place, finder)
            # Of the others nothing is kept: a machine's factors are many.
            if place not in best or scored > scores[place][best[place].bandwidth]:
                best[place] = finder
            scores[place][finder.bandwidth] = scored
    if len(best) < len(batch):
        raise NoGradientError(candidates[-1].bandwidth)
    return [(best[place], scored) for place, scored in enumerate(scores)]


def _lead(finders: Sequence[RecursiveFeatureMachine]) -> list[torch.Tensor]:
    """Set the leading eigenvalues of M of one trained machine a layer; return its eigenvectors.

    Each has the shape (k, width).
    """
    machines = [finder._machine for finder in finders]
    points = torch.stack([machine.points for machine in machines])
    factors = zip(*(machine.factors for machine in machines), strict=True)
    combination = _product([torch.stack(layers) for layers in factors])
    projected = torch.stack([machine.projected for machine in machines])
    # M = G^T G has the eigenvalues of G G^T = B (X X^T) B^T, and eigenvectors G^T u.
    values, vectors = torch.linalg.eigh(
        combination @ projected / _largest_entry(combination, points)
    )
    most = finders[0].n_directions
    leading = vectors.flip(2)[:, :, :most]
    directions = (leading.mT @ combination).float() @ points
    values = values.flip(1)[:, :most].float()
    kept = (values > _NO_EIGENVALUE * values[:, :1]).sum(1).tolist()
    for layer, (finder, k) in enumerate(zip(finders, kept, strict=True)):
        finder.eigenvalues_ = values[layer, :k].cpu().numpy()
        finder._machine = replace(finder._machine, factors=(combination[layer],))
    return [directions[layer, :k] for layer, k in enumerate(kept)]


def _product(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.matmul, factors)


def _largest_entry(combination: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the largest entries of G^T G for G = B X, shape (n_layers, 1, 1)."""
    # The largest entry of a Gram matrix lies on its diagonal.
    columns = (combination.float() @ points).square().sum(1)
    return columns.amax(1).double()[:, None, None]


def _layers_at_once(states: torch.Tensor, n_kept: int) -> int:
    """Return how many layers to train in one batch, of which so many n x n matrices are kept.

    States are (n_layers, n, width).
    """
    if states.device.type == "cpu":
        # One problem keeps all cores busy, and several at once leave the cache.
        return 1
    n = states.shape[1]
    return max(1, _BATCH_BYTES // ((_MATRICES + n_kept) * 8 * n * n))
