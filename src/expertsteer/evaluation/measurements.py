"""Means of metrics over items, and how they change from unsteered on the same items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertsteer.evaluation.intervals import mean_interval, statistic_interval, strata_interval

__all__ = ["Measurement", "measure_means", "measure_statistics", "measure_strata"]


@dataclass(frozen=True)
class Measurement:
    """The mean of a metric over items.

    Attributes
    ----------
    mean : float
        For a metric of a task of the lm-evaluation-harness: what the harness makes of the
        items, which is the mean for most.
    interval : tuple of (float, float)
        95 % bootstrap interval over the items.
    change : float
        From unsteered, on the same items.
    change_interval : tuple of (float, float)
        95 % paired bootstrap interval.
    """

    mean: float
    interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]


def measure_means(values: Sequence[float], unsteered: Sequence[float]) -> Measurement:
    """Return the mean of values, and of their differences from unsteered ones.

    Parameters
    ----------
    values, unsteered : sequence of float
        Of the same items in the same order.

    Returns
    -------
    Measurement
    """
    found = np.asarray(values, dtype=np.float64)
    change = found - np.asarray(unsteered, dtype=np.float64)
    return Measurement(
        float(found.mean()), mean_interval(found), float(change.mean()), mean_interval(change)
    )


def measure_statistics(
    statistic: Callable[[list[Any]], float],
    values: Sequence[Any],
    unsteered: Sequence[Any],
    n_resamples: int = 2000,
) -> Measurement:
    """Return a statistic of items, such as a perplexity, and its change from unsteered.

    Parameters
    ----------
    statistic : callable
        From a list of items to a number.
    values, unsteered : sequence
        Of the same items in the same order.
    n_resamples : int, default=2000
        Resamples of the items for each interval.

    Returns
    -------
    Measurement
    """

    def value(rows: Sequence[int]) -> float:
        return float(statistic([values[row] for row in rows]))

    def change(rows: Sequence[int]) -> float:
        return value(rows) - float(statistic([unsteered[row] for row in rows]))

    n_items, rows = len(values), range(len(values))
    return Measurement(
        value(rows),
        statistic_interval(value, n_items, n_resamples=n_resamples),
        change(rows),
        statistic_interval(change, n_items, n_resamples=n_resamples),
    )


def measure_strata(
    values: Sequence[Sequence[float]],
    unsteered: Sequence[Sequence[float]],
    weights: Sequence[float],
) -> Measurement:
    """Return a weighted mean of several tasks' means, and its change from unsteered.

    Parameters
    ----------
    values, unsteered : sequence of sequence of float
        By task, of the same items in the same order.
    weights : sequence of float
        By task.

    Returns
    -------
    Measurement
        Its intervals are of resamples within every task.
    """
    found = [np.asarray(part, dtype=np.float64) for part in values]
    changes = [
        after - np.asarray(before, dtype=np.float64)
        for after, before in zip(found, unsteered, strict=True)
    ]

    def mean(parts: Sequence[np.ndarray]) -> float:
        return float(np.average([part.mean() for part in parts], weights=weights))

    return Measurement(
        mean(found),
        strata_interval(found, weights),
        mean(changes),
        strata_interval(changes, weights),
    )
