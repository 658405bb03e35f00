"""Linear algebra shared by the closed-form alignments.

States are fewer than dimensions as a rule (n < d), so everything goes through the
n x n Gram matrix; in the other case through the d x d covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from expertsteer.affine import Affine
from expertsteer.gram import gram_matrix, quadratic_forms

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


@dataclass(frozen=True, eq=False)
class ThinSVD:
    """Centred states as U diag(s) V^T, without the directions of no variance.

    Attributes
    ----------
    u : Tensor of shape (n, r)
    s : Tensor of shape (r,)
        Descending.
    mean : Tensor of shape (d,)
    centred : Tensor of shape (n, d)
        The states less their mean.
    right : Tensor of shape (d, r), optional
        V, where the decomposition has found it on its way.
    """

    u: torch.Tensor
    s: torch.Tensor
    mean: torch.Tensor
    centred: torch.Tensor
    right: torch.Tensor | None = None

    @cached_property
    def v(self) -> torch.Tensor:
        """V, (d, r); of wide states found when first asked for."""
        return self.centred.T @ (self.u / self.s) if self.right is None else self.right

    def coordinates(self) -> torch.Tensor:
        """Return the states' principal coordinates U diag(s), (n, r)."""
        return self.u * self.s

    def to_coordinates(self) -> Affine:
        """Return the map from states to their principal coordinates U diag(s)."""
        return Affine((self.v,), -(self.mean @ self.v))

    def from_coordinates(self, core: torch.Tensor) -> Affine:
        """Return the map from what a matrix takes to principal coordinates to states."""
        if self.right is not None:
            return Affine((core, self.right.T), self.mean)
        # V^T = diag(1/s) U^T X, so that V need not be found.
        return Affine((core @ (self.u / self.s).T, self.centred), self.mean)


def thin_svd(states: torch.Tensor, tolerance: float = 1e-6, least: float = 0.0) -> ThinSVD:
    """Return the singular value decomposition of centred states by their smaller side.

    Parameters
    ----------
    states : Tensor of shape (n, d)
        float32 or float64.
    tolerance : float, default=1e-6
        Singular values below this share of the largest are dropped.
    least : float, default=0
        And those up to this.

    Returns
    -------
    ThinSVD
        float64; descending singular values.
    """
    mean = states.mean(0, dtype=torch.float64)
    centred = states.double() - mean
    wide = len(centred) <= centred.shape[1]
    values, vectors = torch.linalg.eigh(gram_matrix(centred if wide else centred.T))
    s = values.flip(0).clamp_min(0).sqrt()
    # Of states without a dimension there is no largest.
    largest = s[:1].sum().clamp_min(torch.finfo(torch.float64).tiny)
    keep = (s > tolerance * largest) & (s > least)
    vectors, s = vectors.flip(1)[:, keep], s[keep]
    if wide:
        return ThinSVD(vectors, s, mean, centred)
    return ThinSVD(centred @ (vectors / s), s, mean, centred, vectors)


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
    coefficients = svd.u.T @ centred
    inner = gram_matrix(coefficients)
    damping = torch.tensor(grid, device=svd.s.device)[:, None] * svd.s.square().mean()
    lost = damping / (svd.s.square() + damping)
    squares = torch.zeros(len(grid), len(centred), dtype=torch.float64, device=svd.s.device)
    if len(svd.s) < len(centred) - 1:  # otherwise the inputs span all that is centred
        products = centred @ coefficients.T
        within = svd.u @ inner
        outside = centred.square().sum(1) - ((2 * products - within) * svd.u).sum(1)
        squares = outside.clamp_min(0) + 2 * lost @ ((products - within) * svd.u).T
    # Sums of squares over a coarse grid do not need the digits of float64.
    inner, u = inner.float(), svd.u.float()
    for row, shares in zip(squares, lost.float(), strict=True):
        row += quadratic_forms(u * shares, inner)
    # 1/n: leaving a row out also moves the mean.
    leverage = ((1 - lost) @ svd.u.square().T + 1 / len(centred)).clamp_max(1 - 1e-9)
    # All at once: every number that is asked for would have the CPU wait for a GPU.
    return grid[int((squares / (1 - leverage).square()).sum(1).argmin())]


def ridge_solution(svd: ThinSVD, outputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the ridge regression of centred outputs, (n, d_out), on principal coordinates."""
    shrink = svd.s / (svd.s.square() + ridge * svd.s.square().mean())
    return shrink[:, None] * (svd.u.T @ outputs)


def ridge_decoder(encoded: ThinSVD, expert: ThinSVD) -> Affine:
    """Return the best linear way back from encoded states to the expert's."""
    coordinates = expert.coordinates()
    ridge = leave_one_out_ridge(encoded, coordinates)
    return between_bases(encoded, ridge_solution(encoded, coordinates, ridge), expert)


def between_bases(left: ThinSVD, core: torch.Tensor, right: ThinSVD) -> Affine:
    """Return the map between states that maps one side's principal coordinates by a matrix."""
    return left.to_coordinates().then(right.from_coordinates(core))
