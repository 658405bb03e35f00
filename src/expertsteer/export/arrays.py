"""Plain arrays for programs that know nothing of packs: safetensors and npz, no pickle.

Each array is named by its 0-based block and is what to add to that block's output. A JSON
file beside them says for which model and at which strength.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from expertsteer.export.job import ExportJob
from expertsteer.files import replacing, write_text

__all__ = ["description_path", "write_npz", "write_safetensors"]


def description_path(path: Path) -> Path:
    """Return where the JSON beside arrays goes."""
    return path.with_suffix(".json")


def write_safetensors(job: ExportJob, path: Path) -> str:
    """Write what ``safetensors.torch.load_file`` reads."""
    with replacing(path) as scratch:
        save_file(
            {str(layer): vector.contiguous() for layer, vector in job.vectors.items()},
            scratch,
            {"format": "pt"},
        )
    return _describe(job, path)


def write_npz(job: ExportJob, path: Path) -> str:
    """Write what ``numpy.load`` reads; arrays of numbers need no pickle."""
    arrays = {str(layer): vector.numpy() for layer, vector in job.vectors.items()}
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] - the names are numbers
    return _describe(job, path)


def _describe(job: ExportJob, path: Path) -> str:
    beside = description_path(path)
    write_text(beside, json.dumps(job.summary(), indent=2) + "\n")
    return f"arrays by block, described in {beside}"
