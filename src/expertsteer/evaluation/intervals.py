"""Bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap

__all__ = ["mean_interval", "statistic_interval", "strata_interval"]

_N_RESAMPLES = 2000
# Draws at once, so that large test splits need little memory.
_MOST_DRAWS = 4_000_000


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
    strata: Sequence[np.ndarray],
    weights: Sequence[float],
    items: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of a weighted mean of strata's means.

    Parameters
    ----------
    strata : sequence of ndarray of shape (n_k,)
        Values by stratum, which are resampled within it.
    weights : sequence of float
        Of the strata.
    items : sequence of sequences of str, optional
        What the values of each stratum are of. Strata that have an item in common are drawn
        together, an item in all of them or in none: such values are not independent. Default:
        no two values are of one item.
    seed : int, default=0
        Of the 2,000 resamples.

    Returns
    -------
    tuple of (float, float)
    """
    rng = np.random.default_rng(seed)
    names = items or [[f"{k} {n}" for n in range(len(part))] for k, part in enumerate(strata)]
    means = np.empty((len(strata), _N_RESAMPLES))
    for block in _blocks(names):
        places = {
            name: n for n, name in enumerate(dict.fromkeys(n for k in block for n in names[k]))
        }
        n = len(places)
        for part in np.array_split(np.arange(_N_RESAMPLES), -(-_N_RESAMPLES * n // _MOST_DRAWS)):
            draws = rng.multinomial(n, np.full(n, 1 / n), size=len(part))
            for k in block:
                times = draws[:, [places[name] for name in names[k]]]
                # Where only some items are shared, a draw may leave a stratum without any: it
                # does not count.
                with np.errstate(invalid="ignore"):
                    means[k, part] = times @ np.asarray(strata[k], float) / times.sum(axis=1)
    return _percentiles(np.average(means, axis=0, weights=weights))


def _blocks(names: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the strata that have items in common, directly or over others, together."""
    blocks: list[tuple[set[str], list[int]]] = []
    for k, of_stratum in enumerate(names):
        shared = [block for block in blocks if not block[0].isdisjoint(of_stratum)]
        blocks = [block for block in blocks if block not in shared]
        merged = set(of_stratum).union(*(block[0] for block in shared))
        blocks.append((merged, sorted([k, *(n for block in shared for n in block[1])])))
    return [members for _, members in blocks]


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)
