"""Products with symmetric matrices, of which symmetry gives away almost half."""

from __future__ import annotations

import torch

__all__ = ["gram_matrix", "quadratic_forms"]

# Bands of rows: 10 of 16 blocks are computed. More bands are smaller and no faster.
_BANDS = 4
# Below this many rows a product is over before the bands pay.
_LEAST_ROWS = 256


def gram_matrix(rows: torch.Tensor) -> torch.Tensor:
    """Return the products of all rows with each other.

    Parameters
    ----------
    rows : Tensor of shape (..., n, d)

    Returns
    -------
    Tensor of shape (..., n, n)
        X X^T.

    Notes
    -----
    Source: this project. BLAS has the same as ``syrk``, which torch does not offer.
    """
    n = rows.shape[-2]
    band = _band(n)
    gram = rows.new_empty(*rows.shape[:-1], n)
    for first in range(0, n, band):
        after = slice(first, None)
        here = slice(first, first + band)
        products = rows[..., here, :] @ rows[..., after, :].mT
        gram[..., here, after] = products
        gram[..., after, here] = products.mT
    return gram


def quadratic_forms(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return x^T A x of every row.

    Parameters
    ----------
    rows : Tensor of shape (n, d)
    matrix : Tensor of shape (d, d)
        A, symmetric.

    Returns
    -------
    Tensor of shape (n,)

    Notes
    -----
    Source: this project.
    """
    d = rows.shape[1]
    band = _band(d)
    forms = rows.new_zeros(len(rows))
    for first in range(0, d, band):
        here, after = slice(first, first + band), slice(first + band, None)
        # What lies beside the diagonal counts for its mirror image too.
        products = rows[:, here] @ matrix[here, first:]
        forms += (products[:, :band] * rows[:, here]).sum(1)
        forms += 2 * (products[:, band:] * rows[:, after]).sum(1)
    return forms


def _band(n: int) -> int:
    return -(-n // _BANDS) if n >= _LEAST_ROWS else max(1, n)
