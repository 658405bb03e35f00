"""One safetensors file with a JSON description: what packs and alignments are saved as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from expertsteer.errors import ExpertSteerError, PackError
from expertsteer.files import replacing

__all__ = ["load_tensor_file", "save_tensor_file", "tensor_file_path"]

_VERSION = 1


def tensor_file_path(path: str | Path) -> Path:
    """Return the path that a tensor file of this name is saved at."""
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    return path


def save_tensor_file(
    path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], description: dict[str, Any]
) -> Path:
    """Write tensors and their description whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file; ``.safetensors`` is appended where missing.
    kind : str
        What it is, for example "steering-pack".
    tensors : mapping of str to Tensor
    description : dict
        JSON types only.

    Returns
    -------
    Path
        The file written.
    """
    path = tensor_file_path(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description, sort_keys=True)
    metadata = {
        "format": f"expertsteer-{kind}",
        "version": str(_VERSION),
        "description": text,
        "sha256": _digest(plain, text),
    }
    with replacing(path) as scratch:
        try:
            save_file(plain, scratch, metadata)
        except SafetensorError as error:  # how the library reports a full disk
            raise ExpertSteerError(f"Cannot write {path}: {error}.") from error
    return path


def load_tensor_file(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensor_file` wrote, and check that it is whole.

    Parameters
    ----------
    path : str or Path
    kind : str

    Returns
    -------
    tensors : dict of str to Tensor
    description : dict

    Raises
    ------
    PackError
        If the file is missing, truncated, altered, of another kind or a newer version.
    """
    path = Path(path)
    noun = kind.replace("-", " ")
    one = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    if not path.is_file():
        raise PackError(f"Got {path}, but there is no such file. Expected {one}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PackError(
            f"Got {path}, but it is not a readable {noun}: truncated or not safetensors ({error})."
        ) from error
    if metadata.get("format") != f"expertsteer-{kind}":
        raise PackError(f"Got {path} of format {metadata.get('format')!r}, but expected {one}.")
    if metadata.get("version") != str(_VERSION):
        raise PackError(
            f"Got {path} of version {metadata.get('version')!r}, but this release reads version "
            f"{_VERSION}. Upgrade expertsteer."
        )
    text = metadata.get("description", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise PackError(f"Got {path}, but its content was altered since it was saved.")
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
