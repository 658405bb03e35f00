"""Control vectors of llama.cpp, as llama.cpp and repeng read and write them.

One float32 tensor ``direction.N`` a layer is added to the output of the 0-based block N.
llama.cpp itself goes by the tensors alone, and refuses index 0 and any other tensor.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from expertsteer.errors import PackError
from expertsteer.export.job import ExportJob
from expertsteer.export.vectors import FileVectors
from expertsteer.files import replacing
from expertsteer.models.gguf import require_gguf_package

__all__ = ["read_control_vector", "write_control_vector"]

_ARCHITECTURE = "controlvector"
_TENSOR_NAME = re.compile(r"direction\.(\d+)")


def write_control_vector(job: ExportJob, path: Path) -> str:
    """Write a control vector; the strength is part of it, for llama.cpp's scale 1.

    Raises
    ------
    PackError
        If the pack steers block 0, which no control vector can.
    ModelError
        If the package gguf is missing.
    """
    require_gguf_package(path.name)
    import gguf

    if 0 in job.vectors:
        raise PackError(
            "Got a pack that steers layer 0, but llama.cpp refuses control vectors for it. Export "
            "the other layers (pack.restrict) or choose another format."
        )
    with replacing(path) as scratch:
        writer = gguf.GGUFWriter(scratch, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", job.pack.target.model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(job.vectors))
        for layer, vector in job.vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return "llama.cpp control vector"


def read_control_vector(path: Path) -> FileVectors:
    """Read a control vector.

    Raises
    ------
    PackError
        If the file is truncated, no GGUF, or llama.cpp would refuse it.
    ModelError
        If the package gguf is missing.
    """
    require_gguf_package(path.name)
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = list(reader.tensors)
    except Exception as error:  # of any kind: the reader trusts what it reads
        raise PackError(
            f"Got {path}, but expected a whole GGUF file ({error}). Download or write it again."
        ) from error
    architecture = fields.get("general.architecture")
    if not tensors or architecture not in (None, _ARCHITECTURE):
        raise PackError(
            f"Got {path} of architecture {architecture!r} with {len(tensors)} tensors, but "
            "expected a control vector."
        )
    vectors = dict(_direction(path, tensor) for tensor in tensors)
    hint = fields.get(f"{_ARCHITECTURE}.model_hint")
    return FileVectors("gguf", vectors, model_type=hint if isinstance(hint, str) else None)


def _direction(path: Path, tensor: Any) -> tuple[int, torch.Tensor]:
    name, kind, shape = tensor.name, tensor.tensor_type.name, tensor.data.shape
    found = _TENSOR_NAME.fullmatch(name)
    if found is None or int(found[1]) == 0:
        raise PackError(
            f"Got {path} with the tensor {name!r}, but expected only direction.N with N from 1 up: "
            "llama.cpp refuses the file as well. Write it again without that tensor."
        )
    if kind != "F32" or len(shape) != 1:
        raise PackError(
            f"Got {path} with {name} of type {kind} and shape {tuple(map(int, shape))}, but "
            "expected one dimension of F32."
        )
    # A copy: the reader maps the file into memory.
    return int(found[1]), torch.tensor(tensor.data)
