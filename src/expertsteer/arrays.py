"""Arrays in, arrays out: one place that checks and converts what users pass.

Every step works on torch tensors in float32 and gives back the kind of array it
was given, so a numpy user never meets a tensor and a torch user never leaves the
device.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

from expertsteer.errors import DataError

__all__ = ["Array", "as_labels", "as_states", "like"]

Array: TypeAlias = "np.ndarray | torch.Tensor"


def as_states(name: str, array: Array, ndim: int = 2, min_rows: int = 2) -> torch.Tensor:
    """Check an array of states and return it as a float32 tensor.

    Parameters
    ----------
    name : str
        What the array is called in error messages.
    array : ndarray or Tensor
        States, one row a text, any real dtype.
    ndim : int, default=2
        Number of dimensions expected.
    min_rows : int, default=2
        Fewest rows that make sense.

    Returns
    -------
    Tensor
        float32, on the device of ``array``; shares memory where it can.

    Raises
    ------
    DataError
        On a wrong number of dimensions, too few rows, NaN or infinity.
    """
    tensor = torch.as_tensor(array)
    if tensor.ndim != ndim:
        raise DataError(
            f"Got {name} with shape {tuple(tensor.shape)}, but expected {ndim} dimensions."
        )
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"Got {name} of dtype {tensor.dtype}, but expected real numbers.")
    if tensor.shape[0] < min_rows:
        raise DataError(
            f"Got {name} with {tensor.shape[0]} rows, but expected at least {min_rows}."
        )
    tensor = tensor.detach().to(torch.float32)
    # One reduction instead of an n x d mask: a sum is finite only if every term is,
    # save for overflow, which the second look tells apart.
    if not torch.isfinite(tensor.sum()) and not (finite := torch.isfinite(tensor)).all():
        bad = int((~finite).flatten(1).any(dim=1).sum())
        raise DataError(
            f"Got {name} with NaN or infinite values in {bad} of {tensor.shape[0]} rows, but "
            "expected finite states. Collect them in float32 or bfloat16 (float16 overflows)."
        )
    return tensor


def as_labels(labels: Array, n_rows: int) -> torch.Tensor:
    """Check labels and return them as a float32 tensor of +1 and -1.

    Parameters
    ----------
    labels : array-like of shape (n_rows,)
        +1 for the wanted behaviour, -1 for its opposite.
    n_rows : int
        Number of states the labels belong to.

    Returns
    -------
    Tensor of shape (n_rows,)
        float32.

    Raises
    ------
    DataError
        On another length, another value, or a single class.
    """
    tensor = torch.as_tensor(labels).detach().to(torch.float32).flatten()
    if tensor.shape[0] != n_rows:
        raise DataError(f"Got {tensor.shape[0]} labels, but expected {n_rows}, one a row.")
    values = sorted(set(tensor.tolist()))
    if not set(values) <= {-1.0, 1.0}:
        shown = ", ".join(f"{v:g}" for v in values[:6])
        raise DataError(f"Got labels with the values {shown}, but expected only +1 and -1.")
    if len(values) < 2:
        raise DataError(
            f"Got only the label {values[0]:+g}, but expected both +1 and -1. "
            "Add rows of the other class."
        )
    return tensor


def like(tensor: torch.Tensor, given: Array) -> Array:
    """Return ``tensor`` as the kind of array that ``given`` is."""
    return tensor.cpu().numpy() if isinstance(given, np.ndarray) else tensor
