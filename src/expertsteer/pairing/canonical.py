"""What two layers share beyond their correlations, one canonical pair at a time.

In canonical coordinates Gaussian states fall apart into pairs of scalars that are independent of
each other, and the information is the sum over the pairs. Estimators that fail in many dimensions
then meet only two at a time. The sum over pairs as such is still too noisy at a few thousand rows,
so the estimate is split (this project):

    I = I_gaussian + sum over pairs of (estimate of the pair - Gaussian value of the pair)

The first term is almost free of noise. The second vanishes for Gaussian states, and because both
of its parts see the same in-sample correlation, so does the optimism of canonical correlations
fitted on the very rows they are measured on. An excess within its noise, which is known from
simulated Gaussian pairs, counts as zero, a clear one counts in full, and in between it is scaled
(firm shrinkage, Gao and Bruce 1997), so that many pairs without evidence do not add up to noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from expertsteer.pairing.gaussian import gaussian_information, shrinkage
from expertsteer.pairing.projection import WhitenedLayers

__all__ = ["PairEstimator", "information_by_pairs", "normal_scores"]

PairEstimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Information of pairs of normal scores: two (n_pairs, n) tensors in, (n_pairs,) nats out."""

MAX_PAIRS = 8
"""Leading canonical pairs examined beyond their correlation; bounds the cost of a table."""

FIRM_SHRINKAGE = (2.5, 5.0)
"""Up to the first number of standard deviations of its noise an excess counts as zero, from the
second on in full."""

REFERENCE_NATS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
REFERENCE_DRAWS = 32

# Ties are broken at random and independently on both sides. Broken by row order instead,
# repeated texts would look perfectly dependent. Larger than the rounding of float32.
JITTER = 1e-6


class _Reference(NamedTuple):
    """Mean and standard deviation of the excess for Gaussian pairs of the given nats."""

    nats: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def normal_scores(values: torch.Tensor, seed: int) -> torch.Tensor:
    """Replace every value by the normal quantile of its rank.

    A monotone map of either side changes no mutual information, and this one takes away the heavy
    tails that would spoil neighbour distances and bandwidths.

    Parameters
    ----------
    values : Tensor of shape (n_pairs, n)
        float64, any scale.
    seed : int
        Of the noise that breaks ties.

    Returns
    -------
    Tensor of shape (n_pairs, n)
        float64; every row is a permutation of the n normal quantiles (i + 1/2) / n.
    """
    n_rows = values.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_rows, generator=generator, dtype=values.dtype)
    scale = JITTER * values.std(dim=-1, keepdim=True)
    order = torch.argsort(values + scale * noise, dim=-1)
    quantiles = torch.special.ndtri((torch.arange(n_rows, dtype=values.dtype) + 0.5) / n_rows)
    return torch.empty_like(values).scatter_(-1, order, quantiles.expand_as(values).contiguous())


def information_by_pairs(
    expert: torch.Tensor,
    expert_rank: int,
    target: WhitenedLayers,
    estimator: PairEstimator,
) -> torch.Tensor:
    """Estimate the information between one expert layer and every target layer.

    Parameters
    ----------
    expert : Tensor of shape (n, n_components)
        Whitened components of the expert layer, float64.
    expert_rank : int
        How many of the columns are not zero.
    target : WhitenedLayers
        Whitened components of all target layers.
    estimator : callable
        Estimates the information of pairs of normal scores. Must be hashable: its readings on
        Gaussian pairs are kept between calls.

    Returns
    -------
    Tensor of shape (n_target_layers,)
        Nats, float64, not clamped.
    """
    n_rows = expert.shape[0]
    information = gaussian_information(expert, expert_rank, target)
    n_pairs = min(MAX_PAIRS, expert_rank, int(target.ranks.max()))
    if n_pairs == 0:
        return information
    left, correlations, right = torch.linalg.svd(expert.mT @ target.scores, full_matrices=False)
    expert_side = (expert @ left[..., :n_pairs]).mT
    target_side = (target.scores @ right[..., :n_pairs, :].mT).mT
    real = torch.arange(n_pairs) < target.ranks.clamp_max(expert_rank)[:, None]
    rho = correlations[:, :n_pairs][real]
    excess = torch.zeros(real.shape, dtype=rho.dtype)
    excess[real] = _without_noise(
        _excess(expert_side[real], target_side[real], rho, estimator),
        _gaussian_nats(rho, n_rows),
        _gaussian_reference(estimator, n_rows),
    )
    return information + excess.sum(dim=-1)


def _gaussian_nats(correlations: torch.Tensor, n_rows: int) -> torch.Tensor:
    return -0.5 * torch.log1p(-((shrinkage(n_rows) * correlations).clamp(-1, 1) ** 2))


def _excess(
    left: torch.Tensor, right: torch.Tensor, correlations: torch.Tensor, estimator: PairEstimator
) -> torch.Tensor:
    """Estimate minus Gaussian value, both from the same rows."""
    estimate = estimator(normal_scores(left, seed=0), normal_scores(right, seed=1))
    return estimate - _gaussian_nats(correlations, left.shape[-1])


def _without_noise(excess: torch.Tensor, nats: torch.Tensor, reference: _Reference) -> torch.Tensor:
    """Take off the bias that Gaussian pairs of the same nats show, then shrink."""
    bias = torch.from_numpy(np.interp(nats.numpy(), reference.nats, reference.mean))
    noise = torch.from_numpy(np.interp(nats.numpy(), reference.nats, reference.deviation))
    unbiased = excess - bias
    low, high = (multiple * noise for multiple in FIRM_SHRINKAGE)
    shrunk = high * (unbiased.abs() - low).clamp_min(0) / (high - low)
    return torch.sign(unbiased) * torch.minimum(shrunk, unbiased.abs())


@lru_cache(maxsize=32)
def _gaussian_reference(estimator: PairEstimator, n_rows: int) -> _Reference:
    """Read the excess off simulated Gaussian pairs of known information."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, REFERENCE_DRAWS, n_rows, generator=generator, dtype=torch.float64)
    draws -= draws.mean(dim=-1, keepdim=True)
    means, deviations = [], []
    for nats in REFERENCE_NATS:
        rho = float(np.sqrt(-np.expm1(-2 * nats)))
        left, right = draws[0], rho * draws[0] + np.sqrt(1 - rho**2) * draws[1]
        correlations = torch.nn.functional.cosine_similarity(left, right, dim=-1)
        excess = _excess(left, right, correlations, estimator)
        means.append(float(excess.mean()))
        deviations.append(float(excess.std()))
    return _Reference(np.asarray(REFERENCE_NATS), np.asarray(means), np.asarray(deviations))
