"""Auto-encoders: the paper's, which never sees the target, and the aligned one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from tqdm.auto import trange

from expertsteer.affine import Affine
from expertsteer.alignment.base import Aligner, PairedAligner
from expertsteer.alignment.linear import ThinSVD, leave_one_out_ridge, thin_svd
from expertsteer.errors import ParameterError

__all__ = ["AlignedAutoEncoder", "AutoEncoder"]

# Shares of the variance: what counts as lost by the encoder, and the ridge of the way back.
_LOST = 1e-12
_DECODER_RIDGE = 1e-9
# Share of the expert's variance that the way back may lack and count as the best there is.
_REACHED = 1e-9

_Solution = tuple[Affine, Callable[[], Affine]]


class AutoEncoder(Aligner):
    r"""The paper's alignment: an affine auto-encoder of the expert's states alone.

    .. math:: \min_{f, g} \frac1K \sum_k \|h_k - g(f(h_k))\|^2

    The loss never sees the target, so any invertible change of the encoded basis is
    equally good; which basis comes out depends on ``random_state`` alone.

    Parameters
    ----------
    solver : {"closed_form", "gradient"}, default="closed_form"
        "gradient" is the paper's: Adam on the loss. "closed_form" is its exact optimum,
        the principal subspace, in an orthonormal basis drawn at random.
    n_steps : int, default=2000
        Optimiser steps of the gradient solver, each on all rows.
    learning_rate : float, default=1e-3
        Of the gradient solver, on states scaled to unit variance.
    random_state : int, default=0
        Draws the starting weights (gradient) or the basis (closed form).
    progress : bool, default=False
        Show a progress bar of the gradient solver.

    Attributes
    ----------
    loss_ : float
        The training loss reached on the rows fitted, relative to their variance.

    Notes
    -----
    Source: ExpertSteer (arXiv 2505.12313), step 1; the closed form: this project, after
    Baldi and Hornik 1989.
    """

    needs_target_states = False

    def __init__(
        self,
        solver: str = "closed_form",
        n_steps: int = 2000,
        learning_rate: float = 1e-3,
        random_state: int = 0,
        progress: bool = False,
    ) -> None:
        self.solver = solver
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.progress = progress

    def _check_parameters(self) -> None:
        if self.solver not in ("closed_form", "gradient"):
            raise ParameterError(
                f"Got solver={self.solver!r}, but expected 'closed_form' or 'gradient'."
            )
        if self.n_steps < 1:
            raise ParameterError(f"Got n_steps={self.n_steps}, but expected at least 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ParameterError(
                f"Got learning_rate={self.learning_rate}, but expected a positive finite number."
            )

    def _fit(self, expert: torch.Tensor, target: torch.Tensor | None, width: int) -> _Solution:
        train, held = self._holdout(len(expert))
        held_target = None if target is None else target[held]
        self._measure(*self._solve(expert[train], width), expert[held], held_target)
        encoder, decoder = self._solve(expert, width)
        return encoder, partial(Affine, decoder.factors, decoder.bias)

    def _solve(self, expert: torch.Tensor, width: int) -> tuple[Affine, Affine]:
        if self.solver == "gradient":
            return self._solve_by_gradient(expert, width)
        return self._solve_exactly(expert, width)

    def _solve_exactly(self, expert: torch.Tensor, width: int) -> tuple[Affine, Affine]:
        svd = thin_svd(expert)
        rank = min(width, len(svd.s))
        kept = svd.v[:, :rank]
        generator = torch.Generator().manual_seed(self.random_state)
        draw = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(draw.to(expert.device)).Q.T  # rank x width, orthonormal rows
        lost = svd.s[rank:].square().sum() / svd.s.square().sum()
        self.loss_ = float(lost) if len(svd.s) else 0.0
        encoder = Affine((kept, basis), -(svd.mean @ kept) @ basis)
        return encoder, Affine((basis.T, kept.T), svd.mean)

    def _solve_by_gradient(self, expert: torch.Tensor, width: int) -> tuple[Affine, Affine]:
        mean = expert.mean(0)
        # One scale for all dimensions: the loss keeps its shape and Adam its step size.
        scale = (expert - mean).square().mean().sqrt().clamp_min(1e-12)
        states = (expert - mean) / scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            encoder = torch.nn.Linear(expert.shape[1], width).to(expert.device)
            decoder = torch.nn.Linear(width, expert.shape[1]).to(expert.device)
        optimizer = torch.optim.Adam(
            [*encoder.parameters(), *decoder.parameters()], lr=self.learning_rate
        )
        with torch.enable_grad():
            for _ in trange(self.n_steps, desc="auto-encoder", delay=1, disable=not self.progress):
                optimizer.zero_grad(set_to_none=True)
                loss = (decoder(encoder(states)) - states).square().mean()
                loss.backward()
                optimizer.step()
        self.loss_ = float(loss.detach())
        with torch.no_grad():
            weight = encoder.weight.T / scale
            return (
                Affine((weight,), encoder.bias - mean @ weight),
                Affine((decoder.weight.T * scale,), decoder.bias * scale + mean),
            )


class AlignedAutoEncoder(PairedAligner):
    r"""An auto-encoder whose encoded states must also meet the target's.

    .. math::
        \min_{f, g} \frac{\sum_k \|h^E_k - g(f(h^E_k))\|^2}{\sum_k \|h^E_k - \bar h^E\|^2}
        + \lambda \frac{\sum_k \|f(h^E_k) - h^T_k\|^2}{\sum_k \|h^T_k - \bar h^T\|^2}

    Both terms are relative to their variance, so the weight means the same for every
    pair of models; weight 0 is the paper's loss, a large one tends to `Ridge`. Where the
    expert's states span no more directions than the target's (fewer rows than the target
    is wide, say), the way back costs nothing and any weight above 0 gives `Ridge`. With
    f(h) = h W + b and g(z) = z D + c, the ridge r adds r (\|W D\|^2 / the first variance
    + λ \|W\|^2 / the second). Solved by alternating least squares: either half has a
    closed form given the other, so no round raises the sum. The rounds start from `Ridge`
    and end early where both terms are as low as they can be.

    Parameters
    ----------
    weight : float, default=10.0
        λ, the weight of the second term.
    n_iterations : int, default=10
        Rounds of the alternation.
    ridge : float, optional
        Regularisation of the encoder, as in `Ridge`.
    random_state : int, default=0
        Basis where the weight is 0, see `AutoEncoder`.

    Attributes
    ----------
    loss_ : float
        The training loss reached on the rows fitted.

    Notes
    -----
    Source: this project.
    """

    def __init__(
        self,
        weight: float = 10.0,
        n_iterations: int = 10,
        ridge: float | None = None,
        random_state: int = 0,
    ) -> None:
        self.weight = weight
        self.n_iterations = n_iterations
        self.ridge = ridge
        self.random_state = random_state

    def _check_parameters(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ParameterError(
                f"Got weight={self.weight}, but expected a finite number from 0 up."
            )
        if self.n_iterations < 1:
            raise ParameterError(f"Got n_iterations={self.n_iterations}, but expected at least 1.")
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ParameterError(f"Got ridge={self.ridge}, but expected a finite number from 0 up.")

    def _fit(self, expert: torch.Tensor, target: torch.Tensor | None, width: int) -> _Solution:
        if self.weight > 0:
            return super()._fit(expert, target, width)
        paper = AutoEncoder(random_state=self.random_state)
        solution = paper._fit(expert, target, width)
        self.loss_, self.r2_ = paper.loss_, paper.r2_
        self.reconstruction_error_ = paper.reconstruction_error_
        return solution

    def _solve(self, expert: ThinSVD, target: ThinSVD) -> torch.Tensor:
        x, y = expert, target
        # In principal coordinates both halves are small: the expert is Z = U diag(s), the
        # target A, and the encoder is r_x x r_y, since nothing outside the target's span
        # helps its term, and where the encoder is wider the rest of the width stays free.
        aimed = y.coordinates()
        self.ridge_ = leave_one_out_ridge(x, aimed) if self.ridge is None else self.ridge
        total_x, total_y = x.s.square().sum(), y.s.square().sum()
        gram = x.s.square()[:, None]  # Z^T Z, which is diagonal
        damped = gram + self.ridge_ * gram.mean()
        within = x.u.T @ aimed
        crossing = x.s[:, None] * within  # Z^T A
        encoder = crossing / damped
        best_back = (gram / damped).flatten().diag()
        d = None
        for _ in range(0 if _can_go_back(x, y, damped, within) else self.n_iterations):
            # The best way back: W^T (Z^T Z + damping) W D = W^T Z^T Z, with Z^T Z diagonal.
            # Without the damping here as well, the two halves would pull at two losses and
            # the rounds could raise either.
            d = _way_back(encoder.T @ (damped * encoder), (gram * encoder).T)
            # No way back is better than Z^T Z / (Z^T Z + damping), and the first encoder, ridge,
            # is the best for the other term: where both are had, nothing is left to lower.
            lacking = gram * (encoder @ d - best_back).square()
            if lacking.sum() < _REACHED * total_x:
                break
            # Setting the gradient in the encoder to zero:
            # (Z^T Z + damping) W (D D^T / total_x + w / total_y)
            #     = Z^T Z D^T / total_x + w Z^T A / total_y
            left = gram * d.T / total_x + self.weight * crossing / total_y
            right = d @ d.T / total_x
            right.diagonal().add_(self.weight / total_y)
            # The way back may be so long that the sum is no longer positive definite in float64.
            encoder = torch.linalg.solve(right, left / damped, left=False)
        back = best_back if d is None else encoder @ d
        # U is orthonormal, so both terms are had without the rows: Z W - A lies in U but for
        # what of A does not.
        lost = gram * (torch.eye(len(gram), device=gram.device) - back).square()
        missed = (x.s[:, None] * encoder - within).square().sum()
        outside = (total_y - within.square().sum()).clamp_min(0)
        self.loss_ = float(lost.sum() / total_x + self.weight * (missed + outside) / total_y)
        return encoder


def _can_go_back(
    expert: ThinSVD, target: ThinSVD, damped: torch.Tensor, within: torch.Tensor
) -> bool:
    """Return whether the best way back from `Ridge` is had for certain, without looking for it.

    With b = s_x^2 + damping, the encoder W has B^1/2 W = diag(s_x / b^1/2) Q diag(s_y) for
    Q = U_x^T U_y, whose rows are orthonormal where the target's states span all that is
    centred. So the eigenvalues of W^T B W that are not zero are at least min(s_x^2 / b)
    min(s_y^2): far enough from zero, the way back loses no direction. And what its own ridge r
    takes, `lacking` in `AlignedAutoEncoder`, is at most r^2 / that least eigenvalue times
    sum_jk b_j Q_jk^2 / s_yk^2, since (Q diag(s_y^2) Q^T)^-1 <= Q diag(s_y^-2) Q^T.

    Parameters
    ----------
    expert, target : ThinSVD
    damped : Tensor of shape (r_x, 1)
        b.
    within : Tensor of shape (r_x, r_y)
        Q diag(s_y).
    """
    if len(target.s) < len(target.u) - 1:
        return False
    squares = target.s.square()
    shares = expert.s.square()[:, None] / damped
    least = shares.min() * squares.min()
    largest = shares.max() * squares.max()
    ridge = _DECODER_RIDGE * (shares * within.square()).sum() / len(damped)
    taken = ridge.square() / least * (damped * (within / squares).square()).sum()
    return bool((least > _LOST * largest) & (taken < _REACHED * expert.s.square().sum()))


def _way_back(squares: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Return the linear way back (E^T E)^-1 E^T Z on the directions that E has not lost.

    Parameters
    ----------
    squares : Tensor of shape (r_y, r_y)
        E^T E.
    products : Tensor of shape (r_y, r_x)
        E^T Z.
    """
    values, vectors = torch.linalg.eigh(squares)
    keep = values > _LOST * values[-1:]
    values, vectors = values[keep], vectors[:, keep]
    inverse = 1 / (values + _DECODER_RIDGE * values.mean())
    return (vectors * inverse) @ (vectors.T @ products)
