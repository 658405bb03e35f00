"""Principal components of every layer, whitened: what all estimators start from."""

from __future__ import annotations

from typing import NamedTuple

import torch

from expertsteer.arrays import Array, as_states
from expertsteer.errors import DataError
from expertsteer.pairing.checks import check_integer

__all__ = ["WhitenedLayers", "resolve_n_components", "whiten_layers"]

MIN_ROWS = 16
MAX_DEFAULT_COMPONENTS = 64
ROWS_PER_DEFAULT_COMPONENT = 8
ROWS_PER_COMPONENT = 4

# A component whose singular value is below this share of the largest one is rounding of
# float32 states, not a direction: whitening would blow it up to unit variance.
RANK_TOLERANCE = 1e-6

# Up to this many rows or columns a full eigendecomposition is the cheaper way.
EXACT_SIZE = 256
OVERSAMPLING = 16
POWER_ITERATIONS = 3


class WhitenedLayers(NamedTuple):
    """Whitened principal components of all layers of one model.

    Attributes
    ----------
    scores : Tensor of shape (n_layers, n, n_components)
        float64, on the CPU. The columns of a layer are centred and orthonormal, so the
        product of two layers' scores is their matrix of correlations. Columns from the
        layer's rank on are zero.
    ranks : Tensor of shape (n_layers,)
        int64, how many columns are not zero.
    """

    scores: torch.Tensor
    ranks: torch.Tensor


def resolve_n_components(n_components: int | None, n_rows: int) -> int:
    """Decide how many principal components a layer may keep.

    Parameters
    ----------
    n_components : int or None
        The user's choice. None means one component for every 8 rows and at most 64. The
        rows bound the noise: k components on either side add about k^2 / 2n nats of pure
        noise to an uncorrected estimate, and 8 rows a component keep the largest sample
        correlation of independent states near 0.66, far from 1. The cap bounds the cost,
        which grows with k^3 for every pair of layers.
    n_rows : int
        Rows of the states.

    Returns
    -------
    int
        An upper bound; a narrower or degenerate layer keeps fewer.

    Raises
    ------
    DataError
        With fewer than 16 rows.
    ParameterError
        If ``n_components`` is not between 1 and a quarter of the rows.
    """
    if n_rows < MIN_ROWS:
        raise DataError(
            f"Got states with {n_rows} rows, but expected at least {MIN_ROWS} to estimate mutual "
            "information. Collect states of more texts."
        )
    if n_components is None:
        return min(n_rows // ROWS_PER_DEFAULT_COMPONENT, MAX_DEFAULT_COMPONENTS)
    most = n_rows // ROWS_PER_COMPONENT
    hint = f", a quarter of the {n_rows} rows; lower it or collect states of more texts"
    return check_integer("n_components", n_components, most, hint)


def whiten_layers(
    name: str, states: Array, n_components: int, device: torch.device | None = None
) -> WhitenedLayers:
    """Reduce every layer to its leading principal components, whitened.

    One layer at a time is held in float32, so the memory is that of one layer plus the scores.
    Small layers are decomposed exactly, from the smaller of the n x n and d x d Gram matrices in
    float64. Large ones go through a randomised range finder on the states themselves, which is
    cheaper than the Gram matrix and, by not squaring the singular values, still resolves the
    small components beside the huge ones that language models have. It is seeded: the same
    states give the same scores.

    Parameters
    ----------
    name : str
        What the states are called in error messages.
    states : ndarray or Tensor of shape (n, n_layers, width)
        States of one model, any real dtype.
    n_components : int
        Most components to keep in a layer.
    device : torch.device, optional
        Where a layer is reduced; default: where the states are.

    Returns
    -------
    WhitenedLayers
        The scores, padded with zero columns to the same number for all layers.

    Raises
    ------
    DataError
        On another number of dimensions, no layer, or NaN or infinity.

    Notes
    -----
    Source: Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1, for the range finder.
    """
    stack = torch.as_tensor(states)
    if stack.ndim != 3 or 0 in stack.shape:
        raise DataError(
            f"Got {name} with shape {tuple(stack.shape)}, but expected 3 dimensions: rows, "
            "layers and width, none of them empty."
        )
    n_rows, n_layers, width = stack.shape
    n_components = min(n_components, width)
    scores = torch.zeros(n_layers, n_rows, n_components, dtype=torch.float64)
    ranks = torch.zeros(n_layers, dtype=torch.int64)
    for layer in range(n_layers):
        values = stack[:, layer].to(device)
        basis = _whiten(as_states(f"{name}[:, {layer}]", values), n_components)
        ranks[layer] = basis.shape[1]
        scores[layer, :, : basis.shape[1]] = basis
    return WhitenedLayers(scores, ranks)


def _whiten(states: torch.Tensor, n_components: int) -> torch.Tensor:
    """Return centred orthonormal float64 columns that span the leading components."""
    # The first row goes first, so that a constant column becomes exactly zero.
    centred = states - states[0]
    centred -= centred.mean(dim=0)
    if min(centred.shape) <= max(EXACT_SIZE, 4 * n_components):
        left, values = _exact(centred)
    else:
        left, values = _randomised(centred, n_components + OVERSAMPLING)
    rank = min(n_components, int((values > RANK_TOLERANCE * values[0]).sum()))
    # Rounding leaves the columns of the smallest components neither centred nor orthogonal.
    left = left[:, :rank] - left[:, :rank].mean(dim=0)
    return torch.linalg.qr(left)[0]


def _exact(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors and singular values, in descending order."""
    matrix = centred.cpu().to(torch.float64)
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    values = squares.flip(0).clamp_min(0).sqrt()
    vectors = vectors.flip(1)
    if tall:
        vectors = matrix @ (vectors / values.clamp_min(torch.finfo(values.dtype).tiny))
    return vectors, values


def _randomised(centred: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate leading left singular vectors and singular values, descending."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(centred.shape[1], size, generator=generator).to(centred)
    basis = torch.linalg.qr(centred @ start)[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(centred.mT @ basis)[0]
        basis = torch.linalg.qr(centred @ basis)[0]
    rotation, values = _exact(basis.mT @ centred)
    return basis.cpu().to(torch.float64) @ rotation, values
