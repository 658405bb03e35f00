"""Saved states: a folder of safetensors shards that an interrupted run continues."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from expertsteer.errors import StatesError
from expertsteer.files import replacing, write_text
from expertsteer.models.cache import require_disk
from expertsteer.states.states import States, StatesDescription

__all__ = ["ShardedRows", "load_states"]

_FORMAT = {"format": "expertsteer-states", "version": 1}
_MANIFEST = "states.json"
_SHARDS = "shard-*.safetensors"
_SHARD_BYTES = 256 << 20
_SHARD_SECONDS = 30.0


class ShardedRows:
    """Rows of a states array that are flushed to shards as they are filled.

    Parameters
    ----------
    folder : Path
        The folder; made if missing, continued if it holds the same collection.
    description : StatesDescription
        What is being collected.
    values : Tensor of shape (n, n_layers, width)
        The array; rows that are already saved are read into it at once.

    Raises
    ------
    StatesError
        If the folder holds another collection.
    """

    def __init__(self, folder: Path, description: StatesDescription, values: torch.Tensor) -> None:
        self.folder = folder
        self.values = values
        self.pending: list[int] = []
        self.flushed_at = time.monotonic()
        manifest = folder / _MANIFEST
        require_disk(folder, 0, "states")
        if not manifest.exists() and any(folder.glob(_SHARDS)):
            raise StatesError(
                f"Got the folder {folder} with states but without {_MANIFEST}, but expected an "
                "empty one or the same collection. Name another folder or remove this one."
            )
        if manifest.exists():
            found = _read_manifest(folder)
            if found != description:
                raise StatesError(
                    f"Got the folder {folder}, which holds states of {found.model.name} "
                    f"({found.n_texts} texts), but expected an empty one or the same collection. "
                    "Name another folder or remove this one."
                )
        self.rows, damaged = _read_shards(folder, values)
        for path in damaged:
            warnings.warn(
                f"{path} is damaged and was removed; its states are collected again.",
                stacklevel=3,
            )
            path.unlink()
        left = values.shape[0] - len(self.rows)
        require_disk(folder, left * values[0].numel() * values.element_size(), "states")
        write_text(manifest, json.dumps(_FORMAT | description.to_dict(), indent=2))

    def __enter__(self) -> ShardedRows:
        return self

    def __exit__(self, *details: object) -> None:
        # Also on Ctrl-C: what was computed is kept.
        self._flush()

    def add(self, rows: list[int]) -> None:
        """Note that these rows of the array are filled."""
        self.pending += rows
        n_bytes = len(self.pending) * self.values[0].numel() * self.values.element_size()
        if n_bytes >= _SHARD_BYTES or time.monotonic() - self.flushed_at >= _SHARD_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        rows = torch.tensor(self.pending)
        path = self.folder / f"shard-{time.time_ns()}.safetensors"
        with replacing(path) as scratch:
            save_file({"rows": rows, "values": self.values[rows]}, scratch)
        self.pending = []
        self.flushed_at = time.monotonic()


def load_states(folder: Path) -> States:
    """Load finished states; see `States.load`."""
    description = _read_manifest(folder)
    values = _empty_values(description, "cpu")
    rows, damaged = _read_shards(folder, values)
    if len(rows) < description.n_texts:
        names = ", ".join(path.name for path in damaged)
        raise StatesError(
            f"Got {folder} with the states of {len(rows)} of {description.n_texts} texts"
            f"{f' (damaged: {names})' if damaged else ''}, but expected all of them. "
            "Run the same collection again; it continues."
        )
    return States(values, description)


def _read_manifest(folder: Path) -> StatesDescription:
    path = folder / _MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = {key: fields.pop(key) for key in _FORMAT}
        if found == _FORMAT:
            description = StatesDescription.from_dict(fields)
            _empty_values(description, "meta")  # raises on sizes and types that cannot be
            return description
    except FileNotFoundError as error:
        raise StatesError(
            f"Got {folder}, but expected saved states (no {_MANIFEST} there). Collect them first."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise StatesError(
            f"Got {path}, but expected a readable manifest of saved states. Remove the folder and "
            "collect the states again."
        ) from error
    raise StatesError(f"Got {path} of {found}, but expected {_FORMAT}. Collect the states again.")


def _empty_values(description: StatesDescription, device: str) -> torch.Tensor:
    shape = (description.n_texts, len(description.layers), description.model.width)
    return torch.empty(shape, dtype=getattr(torch, description.dtype), device=device)


def _read_shards(folder: Path, values: torch.Tensor) -> tuple[set[int], list[Path]]:
    """Fill in the saved rows; return which they are, and the shards that cannot be read."""
    done: set[int] = set()
    damaged: list[Path] = []
    for path in sorted(folder.glob(_SHARDS)):
        try:
            shard = load_file(path)
            rows, saved = shard["rows"], shard["values"]
            if saved.shape != (len(rows), *values.shape[1:]):
                raise IndexError("assigning would repeat the values")
            values[rows] = saved
        except (SafetensorError, KeyError, IndexError, RuntimeError, OSError):
            damaged.append(path)
            continue
        done.update(rows.tolist())
    return done, damaged
