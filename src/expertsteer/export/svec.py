"""The ``.svec`` files of activation-steering and AISteer360: JSON, one direction a layer.

Both name a layer by the 0-based block whose output its direction was found in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from expertsteer.errors import PackError
from expertsteer.export.vectors import FileVectors

__all__ = ["read_svec"]


def read_svec(path: Path) -> FileVectors:
    """Read a ``.svec`` file.

    Raises
    ------
    PackError
        If the file is no such JSON, or its directions are not one vector a layer
        (directions by token or by attention head do not steer the residual stream as one).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(f"Got {path}, but expected JSON ({error}).") from error
    directions = content.get("directions") if isinstance(content, dict) else None
    if not isinstance(directions, dict) or not directions:
        raise PackError(f"Got {path}, but expected an object with directions by layer.")
    if content.get("num_heads") is not None:
        raise PackError(
            f"Got {path} with directions of attention heads (num_heads), but expected directions "
            "of the residual stream."
        )
    model_type = content.get("model_type")
    return FileVectors(
        "svec",
        dict(_direction(path, layer, values) for layer, values in directions.items()),
        model_type=model_type if isinstance(model_type, str) else None,
    )


def _direction(path: Path, layer: str, values: Any) -> tuple[int, torch.Tensor]:
    if not (layer.isascii() and layer.isdigit()):
        raise PackError(f"Got {path} with the layer {layer!r}, but expected a block's number.")
    try:
        vector = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise PackError(
            f"Got {path} with no list of numbers for layer {layer} ({error})."
        ) from error
    if vector.ndim == 2 and vector.shape[0] == 1:
        vector = vector[0]  # AISteer360 saves a row a token or basis vector
    if vector.ndim != 1:
        raise PackError(
            f"Got {path} with directions of shape {tuple(vector.shape)} for layer {layer}, but "
            "expected one vector a layer."
        )
    return int(layer), vector
