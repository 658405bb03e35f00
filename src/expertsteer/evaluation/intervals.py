"""Bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap

__all__ = ["mean_interval", "statistic_interval", "strata_interval"]

_N_RESAMPLES = 2000


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of a mean.

    Parameters
    ----------
    values : ndarray of shape (n,)
        One value an item; differences of pairs give a paired interval.
    seed : int, default=0
        Of the 2,000 resamples.

    Returns
    -------
    tuple of (float, float)
        Both the value itself where all values are equal.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=_N_RESAMPLES, method="percentile", rng=seed)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def statistic_interval(
    statistic: Callable[[Sequence[int]], float],
    n_items: int,
    seed: int = 0,
    n_resamples: int = _N_RESAMPLES,
) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of any statistic of items.

    Parameters
    ----------
    statistic : callable
        From places of items, some of them several times, to a number.
    n_items : int
    seed : int, default=0
        Of the resamples.
    n_resamples : int, default=2000

    Returns
    -------
    tuple of (float, float)
        Resamples whose statistic is not finite do not count; NaN if none's is.
    """
    rng = np.random.default_rng(seed)
    resampled = [
        statistic(rng.integers(n_items, size=n_items).tolist()) for _ in range(n_resamples)
    ]
    return _percentiles(np.array(resampled))


def strata_interval(
    strata: Sequence[np.ndarray], weights: Sequence[float], seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of a weighted mean of strata's means.

    Parameters
    ----------
    strata : sequence of ndarray of shape (n_k,)
        Values by stratum, which are resampled within it.
    weights : sequence of float
        Of the strata.
    seed : int, default=0
        Of the 2,000 resamples.

    Returns
    -------
    tuple of (float, float)
    """
    rng = np.random.default_rng(seed)
    means = [
        [rng.choice(values, len(values)).mean() for _ in range(_N_RESAMPLES)] for values in strata
    ]
    return _percentiles(np.average(means, axis=0, weights=weights))


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)
