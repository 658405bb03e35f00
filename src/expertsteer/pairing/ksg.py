"""Mutual information of scalar pairs from nearest neighbours (Kraskov et al. 2004)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from scipy.spatial import KDTree

__all__ = ["ksg_pairs"]

ROUNDING = 1e-10


def ksg_pairs(left: torch.Tensor, right: torch.Tensor, n_neighbors: int) -> torch.Tensor:
    """Estimate the information of pairs of scalars with Kraskov's first estimator.

    psi(k) + psi(n) - < psi(n_x + 1) + psi(n_y + 1) >, where n_x and n_y count the rows strictly
    closer in one coordinate than the k-th neighbour is in the larger of both.

    Parameters
    ----------
    left, right : Tensor of shape (n_pairs, n)
        Normal scores, float64: every row holds the same values in another order.
    n_neighbors : int
        k. More neighbours: less noise, more bias where the dependence is strong.

    Returns
    -------
    Tensor of shape (n_pairs,)
        Nats, float64.

    Notes
    -----
    Source: Kraskov, Stoegbauer and Grassberger (2004), equation 8.
    """
    n_rows = left.shape[-1]
    points = torch.stack([left, right], dim=-1).numpy()

    def radii(pair: int) -> torch.Tensor:
        cloud = points[pair]
        distances, _ = KDTree(cloud).query(cloud, n_neighbors + 1, p=float("inf"))
        return torch.from_numpy(distances[:, -1])

    # The tree search runs outside the interpreter lock, so threads do speed it up.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        radius = torch.stack(list(pool.map(radii, range(len(points)))))
    # In one coordinate the k-th neighbour lies at this very distance and must not count as closer,
    # whichever way the sums below are rounded.
    radius *= 1 - ROUNDING
    ordered = left[0].sort().values
    psi = torch.special.digamma(torch.arange(1, n_rows + 1, dtype=left.dtype))

    def psi_of_count(values: torch.Tensor) -> torch.Tensor:
        below = torch.searchsorted(ordered, values - radius, right=True)
        upto = torch.searchsorted(ordered, values + radius)
        # The row itself is among those counted: that is the "+ 1" of the formula.
        return psi[upto - below - 1]

    local = psi_of_count(left) + psi_of_count(right)
    return psi[n_neighbors - 1] + psi[n_rows - 1] - local.mean(dim=-1)
