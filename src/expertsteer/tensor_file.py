"""One safetensors file with a JSON description: what packs and alignments are saved as."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from expertsteer.errors import PackError
from expertsteer.files import replacing

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALIGNMENT_KIND",
    "PACK_KIND",
    "complete_description",
    "load_tensor_file",
    "read_description",
    "save_tensor_file",
    "tensor_file_path",
]

PACK_KIND = "steering-pack"
ALIGNMENT_KIND = "alignment"

_VERSION = 1
# The types of tensors by their names in safetensors.
_TYPES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "I64": "torch.int64",
    "I32": "torch.int32",
    "I16": "torch.int16",
    "I8": "torch.int8",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
}


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
    from safetensors.torch import save_file

    path = tensor_file_path(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description, sort_keys=True)
    metadata = {
        "format": f"expertsteer-{kind}",
        "version": str(_VERSION),
        "description": text,
        "sha256": _digest({name: _given(tensor) for name, tensor in plain.items()}, text),
    }
    with replacing(path) as scratch:
        save_file(plain, scratch, metadata)
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
    _, description = read_description(path, [kind])
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, [kind], error) from error
    return tensors, description


def read_description(path: str | Path, kinds: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Read what a tensor file says it holds, and check that all of it is whole.

    Nothing of this loads torch, so that it answers at once.

    Parameters
    ----------
    path : str or Path
    kinds : sequence of str
        What it may be.

    Returns
    -------
    kind : str
    description : dict

    Raises
    ------
    PackError
        If the file is missing, truncated, altered, of another kind or a newer version.
    """
    path = Path(path)
    wanted = " or ".join(
        f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in map(_noun, kinds)
    )
    if not path.is_file():
        raise PackError(f"Got {path}, but there is no such file. Expected {wanted}.")
    try:
        metadata, contents = _read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, kinds, error) from error
    found = metadata.get("format")
    kind = next((kind for kind in kinds if found == f"expertsteer-{kind}"), None)
    if kind is None:
        raise PackError(f"Got {path} of format {found!r}, but expected {wanted}.")
    if metadata.get("version") != str(_VERSION):
        raise PackError(
            f"Got {path} of version {metadata.get('version')!r}, but this release reads version "
            f"{_VERSION}. Upgrade expertsteer."
        )
    text = metadata.get("description", "")
    if metadata.get("sha256") != _digest(contents, text):
        raise PackError(f"Got {path}, but its content was altered since it was saved.")
    return kind, json.loads(text)


@contextmanager
def complete_description(path: str | Path) -> Iterator[None]:
    """Within it, what a description lacks is an error that names the file.

    Raises
    ------
    PackError
        Where a field is missing or of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise PackError(f"Got {path}, but its description is incomplete ({error}).") from error


def _noun(kind: str) -> str:
    return kind.replace("-", " ")


def _unreadable(path: str | Path, kinds: Sequence[str], error: Exception) -> PackError:
    return PackError(
        f"Got {path}, but it is not a readable {' or '.join(map(_noun, kinds))}: truncated or not "
        f"safetensors ({error})."
    )


_Content = tuple[tuple[int, ...], str, memoryview]


def _read(path: Path) -> tuple[dict[str, str], dict[str, _Content]]:
    """Return the metadata of a safetensors file, and shape, type and bytes of its tensors."""
    # By hand, since safetensors' own reader loads numpy or torch to open a file.
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    metadata = dict(header.pop("__metadata__", {}))
    end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if end != len(content):
        raise ValueError(f"{len(content):,} bytes, but expected {end:,}")
    contents = {}
    for name, tensor in header.items():
        first, last = tensor["data_offsets"]
        shape = tuple(tensor["shape"])
        contents[name] = (shape, _TYPES.get(tensor["dtype"], ""), content[start:][first:last])
    return metadata, contents


def _given(tensor: torch.Tensor) -> _Content:
    import torch

    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return tuple(tensor.shape), str(tensor.dtype), data


def _digest(contents: Mapping[str, _Content], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(contents):
        shape, dtype, data = contents[name]
        digest.update(f"{name}{shape}{dtype}".encode())
        digest.update(data)
    return digest.hexdigest()
