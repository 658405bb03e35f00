"""Mutual information of Gaussian states, from their canonical correlations."""

from __future__ import annotations

import torch

from expertsteer.pairing.projection import WhitenedLayers

__all__ = ["gaussian_information", "shrinkage"]


def shrinkage(n_rows: int) -> float:
    """Factor below 1 that every sample correlation is multiplied with.

    A correlation of 1 would count infinite nats; shrunk towards independence with the weight
    1 / (n^2 + 1) it counts about log(n) - 0.35. Sampling moves 1 - rho^2 by a factor of about
    1 + sqrt(2 / n), whatever rho is, so a weight of 1 / n would already bias strong correlations
    by more than their noise; the square stays below it up to rho = 1 - 1 / n.

    Parameters
    ----------
    n_rows : int
        Rows of the states.

    Returns
    -------
    float
        n^2 / (n^2 + 1).
    """
    return n_rows**2 / (n_rows**2 + 1)


def gaussian_information(
    expert: torch.Tensor, expert_rank: int, target: WhitenedLayers
) -> torch.Tensor:
    """Estimate the information between one expert layer and every target layer.

    With C the matrix of correlations of the whitened components, the estimate is
    -1/2 log det(I - C C^T), which is -1/2 sum log(1 - rho^2) over the canonical correlations,
    less its exact mean excess over the truth for Gaussian states. It is not clamped: states that
    share nothing read 0 on average, so half of such pairs read slightly below 0, and pairs of
    little information keep an order.

    Parameters
    ----------
    expert : Tensor of shape (n, n_components)
        Whitened components of the expert layer, float64.
    expert_rank : int
        How many of the columns are not zero.
    target : WhitenedLayers
        Whitened components of all target layers.

    Returns
    -------
    Tensor of shape (n_target_layers,)
        Nats, float64.

    Notes
    -----
    The log determinant of a p x p Wishart matrix with m degrees of freedom has the mean
    log det(Sigma) + p log 2 + sum_{i=1..p} psi((m + 1 - i) / 2) (Anderson 2003, section 7.5). The
    centred sample has m = n - 1, and the estimate is half of log det S_xx + log det S_yy
    - log det S_xy, whose constants cancel up to the three sums.
    """
    n_rows = expert.shape[0]
    correlations = shrinkage(n_rows) * (expert.mT @ target.scores)
    # The smaller of the two products: zero columns beyond a rank change no determinant.
    if correlations.shape[1] > correlations.shape[2]:
        correlations = correlations.mT
    product = correlations @ correlations.mT
    factor = torch.linalg.cholesky(torch.eye(product.shape[-1], dtype=product.dtype) - product)
    raw = -factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    return raw - _excess(n_rows, expert_rank, target.ranks)


def _excess(n_rows: int, expert_rank: int, target_ranks: torch.Tensor) -> torch.Tensor:
    """Mean of the uncorrected estimate minus the truth, for Gaussian states."""
    most = expert_rank + int(target_ranks.max())
    orders = torch.arange(1, most + 1, dtype=torch.float64)
    terms = torch.special.digamma((n_rows - orders) / 2)
    sums = torch.cat([terms.new_zeros(1), terms.cumsum(0)])
    return 0.5 * (sums[expert_rank] + sums[target_ranks] - sums[expert_rank + target_ranks])
