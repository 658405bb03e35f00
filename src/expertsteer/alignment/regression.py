"""Alignments fitted to paired states in closed form: ridge, Procrustes, CCA."""

from __future__ import annotations

import math

import torch

from expertsteer.alignment.base import PairedAligner
from expertsteer.alignment.linear import ThinSVD, leave_one_out_ridge, ridge_solution
from expertsteer.errors import ParameterError

__all__ = ["CCA", "Procrustes", "Ridge"]


class Ridge(PairedAligner):
    r"""Ridge regression of the target's states on the expert's.

    .. math:: W = (X^\top X + \lambda I)^{-1} X^\top Y

    on centred states, solved in the smaller of n and d dimensions.

    Parameters
    ----------
    ridge : float, optional
        Strength relative to the mean squared singular value of the expert's states;
        default: the best of 1e-6 to 100 by leave-one-out error.

    Attributes
    ----------
    ridge_ : float
        The strength used.

    Notes
    -----
    Source: this project.

    Examples
    --------
    >>> import numpy as np
    >>> from expertsteer.alignment import Ridge
    >>> rng = np.random.default_rng(0)
    >>> expert = rng.normal(size=(200, 8)).astype("float32")
    >>> target = expert @ rng.normal(size=(8, 5)).astype("float32")
    >>> round(Ridge().fit(expert, target).r2_, 3)
    1.0
    """

    def __init__(self, ridge: float | None = None) -> None:
        self.ridge = ridge

    def _check_parameters(self) -> None:
        _check_ridge(self.ridge)

    def _solve(self, expert: ThinSVD, target: ThinSVD) -> torch.Tensor:
        aimed = target.coordinates()
        self.ridge_ = leave_one_out_ridge(expert, aimed) if self.ridge is None else self.ridge
        return ridge_solution(expert, aimed, self.ridge_)


class Procrustes(PairedAligner):
    r"""The rotation and uniform scale that bring expert states nearest to the target's.

    With the SVD :math:`X^\top Y = U S V^\top` of centred states, :math:`W = c\,U V^\top`
    and :math:`c = \mathrm{tr} S / \|X U V^\top\|^2`; semi-orthogonal where widths differ.

    Notes
    -----
    Source: Schoenemann 1966, for widths that differ: this project.
    """

    def _solve(self, expert: ThinSVD, target: ThinSVD) -> torch.Tensor:
        x, y = expert, target
        # X^T Y = Vx (Sx Ux^T Uy Sy) Vy^T, so only the small core is decomposed.
        a, s, bt = torch.linalg.svd(x.s[:, None] * (x.u.T @ y.u) * y.s, full_matrices=False)
        rotated = x.u @ (x.s[:, None] * a)
        return a @ bt * (s.sum() / rotated.square().sum())


class CCA(PairedAligner):
    r"""Regularised canonical correlation analysis, then a map along the canonical pairs.

    Expert states are projected to their canonical variates, scaled by the canonical
    correlations and written back through the target's variates.

    Parameters
    ----------
    n_components : int, optional
        Canonical pairs kept, strongest first; default: all.
    ridge : float, default=1e-2
        Regularisation of both covariances, relative to their mean eigenvalue.

    Attributes
    ----------
    correlations_ : Tensor of shape (n_components,)
        Canonical correlations of the rows fitted, descending, between 0 and 1.

    Notes
    -----
    Source: Hotelling 1936; Vinod 1976 for the regularised form.
    """

    def __init__(self, n_components: int | None = None, ridge: float = 1e-2) -> None:
        self.n_components = n_components
        self.ridge = ridge

    def _check_parameters(self) -> None:
        _check_ridge(self.ridge)
        if self.n_components is not None and self.n_components < 1:
            raise ParameterError(
                f"Got n_components={self.n_components}, but expected at least 1, or None for all."
            )

    def _solve(self, expert: ThinSVD, target: ThinSVD) -> torch.Tensor:
        x, y = expert, target
        scale_x = (x.s.square() + self.ridge * x.s.square().mean()).sqrt()
        scale_y = (y.s.square() + self.ridge * y.s.square().mean()).sqrt()
        core = (x.s / scale_x)[:, None] * (x.u.T @ y.u) * (y.s / scale_y)
        a, correlations, bt = torch.linalg.svd(core, full_matrices=False)
        kept = slice(self.n_components)
        self.correlations_ = correlations[kept].float()
        to_variates = a[:, kept] / scale_x[:, None]
        return (to_variates * correlations[kept]) @ (bt[kept] * scale_y)


def _check_ridge(ridge: float | None) -> None:
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise ParameterError(f"Got ridge={ridge}, but expected a finite number from 0 up.")
