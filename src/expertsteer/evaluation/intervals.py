"""Bootstrap intervals of means."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap

__all__ = ["mean_interval"]


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
    found = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=seed)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
