"""Linear algebra shared by the closed-form alignments.

States are fewer than dimensions as a rule (n < d), so everything goes through the
n x n Gram matrix; in the other case through the d x d covariance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "ThinSVD",
    "between_bases",
    "leave_one_out_ridge",
    "ridge_decoder",
    "ridge_solution",
    "thin_svd",
]

# Tried by leave-one-out error, relative to the mean eigenvalue of the Gram matrix.
RIDGE_GRID = tuple(10.0**power for power in range(-6, 3))


class ThinSVD(NamedTuple):
    """Centred states as U diag(s) V^T, without the directions of no variance."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor
    mean: torch.Tensor


def thin_svd(states: torch.Tensor, tolerance: float = 1e-6) -> ThinSVD:
    """Return the singular value decomposition of centred states by their smaller side.

    Parameters
    ----------
    states : Tensor of shape (n, d)
        float32.
    tolerance : float, default=1e-6
        Singular values below this share of the largest are dropped.

    Returns
    -------
    ThinSVD
        float64; descending singular values.
    """
    mean = states.mean(0, dtype=torch.float64)
    centred = states.double() - mean
    n, d = centred.shape
    if n <= d:
        values, u = torch.linalg.eigh(centred @ centred.T)
        values, u = values.flip(0), u.flip(1)
        s = values.clamp_min(0).sqrt()
        keep = s > tolerance * s[0].clamp_min(torch.finfo(torch.float64).tiny)
        u, s = u[:, keep], s[keep]
        return ThinSVD(u, s, centred.T @ (u / s), mean)
    values, v = torch.linalg.eigh(centred.T @ centred)
    values, v = values.flip(0), v.flip(1)
    s = values.clamp_min(0).sqrt()
    keep = s > tolerance * s[0].clamp_min(torch.finfo(torch.float64).tiny)
    v, s = v[:, keep], s[keep]
    return ThinSVD(centred @ (v / s), s, v, mean)


def leave_one_out_ridge(
    svd: ThinSVD, outputs: torch.Tensor, grid: tuple[float, ...] = RIDGE_GRID
) -> float:
    """Return the ridge strength with the least leave-one-out error.

    The error of every row left out in turn has a closed form, (1 - h_kk)^-1 times the
    residual, and the squares of the residuals follow from products of the rows. So the
    whole grid costs one decomposition and, a strength, O(n^3) whatever the width.

    Parameters
    ----------
    svd : ThinSVD
        Inputs.
    outputs : Tensor of shape (n, d_out)
        What is regressed on them; a rotation of its columns changes nothing.
    grid : tuple of float
        Strengths to try, relative to the mean squared singular value.

    Returns
    -------
    float
        The best of the grid, relative.
    """
    centred = outputs.double() - outputs.mean(0, dtype=torch.float64)
    # With C = U^T Y the residual of a strength is (Y - U C) + U (1 - shrink) C: what lies
    # outside the span of the inputs, and what the shrinking loses within it.
    products = centred @ (svd.u.T @ centred).T
    inner = svd.u.T @ products
    within = svd.u @ inner
    outside = (centred.square().sum(1) - ((2 * products - within) * svd.u).sum(1)).clamp_min(0)
    crossing = products - within
    # Sums of squares over a coarse grid do not need the digits of float64.
    inner, u = inner.float(), svd.u.float()
    scale = svd.s.square().mean()
    errors = []
    for ridge in grid:
        shrink = svd.s.square() / (svd.s.square() + ridge * scale)
        lost = 1 - shrink
        squares = outside + 2 * ((crossing * svd.u) @ lost)
        squares += (((u * lost.float()) @ inner) * u * lost.float()).sum(1)
        # 1/n: leaving a row out also moves the mean.
        leverage = (svd.u.square() @ shrink + 1 / len(centred)).clamp_max(1 - 1e-9)
        errors.append((squares / (1 - leverage).square()).sum())
    # All at once: every number that is asked for would have the CPU wait for a GPU.
    found = torch.stack(errors).tolist()
    return grid[found.index(min(found))]


def ridge_coefficients(svd: ThinSVD, outputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the ridge regression on the inputs' principal directions, (rank, d_out), float64."""
    shrink = svd.s / (svd.s.square() + ridge * svd.s.square().mean())
    return shrink[:, None] * (svd.u.T @ (outputs.double() - outputs.mean(0, dtype=torch.float64)))


def ridge_solution(
    svd: ThinSVD, outputs: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the ridge regression of outputs on the inputs in ``svd``."""
    coefficients = ridge_coefficients(svd, outputs, ridge)
    mean = outputs.mean(0, dtype=torch.float64)
    # The product with the width squared is the dear one, and its result is float32 anyway.
    weight = svd.v.float() @ coefficients.float()
    return weight, (mean - (svd.mean @ svd.v) @ coefficients).float()


def ridge_decoder(encoded: torch.Tensor, expert: ThinSVD) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the best linear way back from encoded to expert states."""
    svd = thin_svd(encoded)
    # In the expert's principal coordinates, as many as it has rows instead of its width.
    coordinates = expert.u * expert.s
    weight, bias = ridge_solution(svd, coordinates, leave_one_out_ridge(svd, coordinates))
    back = expert.v.float().T
    return weight @ back, bias @ back + expert.mean.float()


def between_bases(left: ThinSVD, core: torch.Tensor, right: ThinSVD) -> torch.Tensor:
    """Return V_left core V_right^T, (d_left, d_right), float32."""
    return (left.v @ core).float() @ right.v.float().T
