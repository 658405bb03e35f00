"""Saved states: a folder of safetensors shards that an interrupted run continues.

Each process writes shards of its own, and together with the manifest they are the
result: nothing is ever merged into one array to be saved.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open

from expertsteer.errors import ExpertSteerError, PackError, StatesError
from expertsteer.files import write_text
from expertsteer.models.cache import require_disk
from expertsteer.processes import is_main_process, process_index, wait_for_all
from expertsteer.states.states import States, StatesDescription
from expertsteer.tensor_file import load_tensor_file, save_tensor_file

__all__ = ["SAVED_VERSION", "SavedStates", "ShardWriter", "check_states", "load_states"]

SAVED_VERSION = 3
_FORMAT = {"format": "expertsteer-states", "version": SAVED_VERSION}
_MANIFEST = "states.json"
_SHARDS = "shard-*.safetensors"
_SHARD_KIND = "states-shard"
# Some times as much is held for a moment, while the parts are put together and written.
_SHARD_BYTES = 64 << 20
_SHARD_SECONDS = 30.0


class ShardWriter:
    """Rows of states that are flushed to shards as they come.

    Parameters
    ----------
    folder : Path
        The folder; it exists, is empty or holds the same collection, which is continued.
    description : StatesDescription
        What is being collected.

    Attributes
    ----------
    rows : set of int
        Rows that earlier runs saved.

    Raises
    ------
    StatesError
        If the folder holds another collection or one of another version.
    ExpertSteerError
        If the disk has no room.
    """

    def __init__(self, folder: Path, description: StatesDescription) -> None:
        self.folder = folder
        self.description = description
        self._pending: list[tuple[list[int], torch.Tensor]] = []
        self._forget()
        if is_main_process():
            self._prepare()
        wait_for_all("checking the saved states")
        self.rows = _saved_rows(folder)
        # Nobody writes before all have read what is there: shares are dealt by it.
        wait_for_all("checking the saved states")

    def _prepare(self) -> None:
        manifest = self.folder / _MANIFEST
        if not manifest.exists() and any(self.folder.glob(_SHARDS)):
            raise StatesError(
                f"Got the folder {self.folder} with states but without {_MANIFEST}, but expected "
                "an empty one or the same collection. Name another folder or remove this one."
            )
        if manifest.exists():
            found = _read_manifest(self.folder)
            if found != self.description:
                raise StatesError(
                    f"Got the folder {self.folder}, which holds states of {found.model.name} "
                    f"({found.n_texts} texts), but expected an empty one or the same collection. "
                    "Name another folder or remove this one."
                )
        for path in _damaged_shards(self.folder, self.description):
            warnings.warn(
                f"{path} is damaged and was removed; its states are collected again.",
                stacklevel=4,
            )
            path.unlink()
        n_left = self.description.n_texts - len(_saved_rows(self.folder))
        require_disk(self.folder, n_left * _row_bytes(self.description), "states")
        write_text(manifest, json.dumps(_FORMAT | self.description.to_dict(), indent=2))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *details: object) -> None:
        # Also on Ctrl-C: what was computed is kept.
        self._flush()

    def add(self, rows: list[int], values: torch.Tensor) -> None:
        """Take some rows of states, (len(rows), n_layers, width)."""
        # At one stroke: an interruption in between would tear rows and values apart.
        self._pending.append((rows, values))
        self._n_bytes += values.numel() * values.element_size()
        late = time.monotonic() - self._flushed_at >= _SHARD_SECONDS
        if late or self._n_bytes >= _SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is left and wait until every process has done so.

        Raises
        ------
        StatesError
            If rows are missing: a process saw other shards than the others did, as with a
            network file system that shows them late.
        """
        self._flush()
        wait_for_all("collecting states")
        if is_main_process():
            _require_all(self.folder, self.description, len(_saved_rows(self.folder)))

    def _flush(self) -> None:
        if not self._pending:
            return
        name = f"shard-{time.time_ns()}-{process_index()}.safetensors"
        rows, values = zip(*self._pending, strict=True)
        shard = {
            "rows": torch.tensor([n for part in rows for n in part]),
            "values": torch.cat(values),
        }
        try:
            save_tensor_file(self.folder / name, _SHARD_KIND, shard, self.description.to_dict())
        except ExpertSteerError as error:
            self._forget()  # on leaving it would fail again
            raise ExpertSteerError(
                f"{error} Free some room; states that were written before are kept, and the same "
                "command goes on from them."
            ) from error
        self._forget()

    def _forget(self) -> None:
        self._pending, self._n_bytes = [], 0
        self._flushed_at = time.monotonic()


class SavedStates(States):
    """States in a folder of shards, read when they are first looked at.

    Parameters
    ----------
    folder : Path
        Finished.
    description : StatesDescription
    device : torch.device
        As of `States`.
    """

    folder: Path

    def __init__(self, folder: Path, description: StatesDescription, device: torch.device) -> None:
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "description", description)
        object.__setattr__(self, "device", device)

    @cached_property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """Block outputs on the residual stream, (n, n_layers, width)."""
        return load_states(self.folder).values


def load_states(folder: Path) -> States:
    """Load finished states; see `States.load`."""
    description = _read_manifest(folder)
    values = _empty_values(description, "cpu")
    for rows, saved in _whole_shards(folder, description):
        values[rows] = saved
    return States(values, description)


def check_states(folder: Path) -> StatesDescription:
    """Return what a folder of finished states holds, with one shard in memory at a time.

    Raises
    ------
    StatesError
        As `States.load` does.
    """
    description = _read_manifest(folder)
    for _ in _whole_shards(folder, description):
        pass
    return description


def _whole_shards(
    folder: Path, description: StatesDescription
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the rows and values of all shards; at the end, raise unless every row was there."""
    done: set[int] = set()
    damaged: list[str] = []
    for path in _shards(folder):
        try:
            rows, values = _read_shard(path, description)
        except StatesError:
            damaged.append(path.name)
            continue
        done.update(rows.tolist())
        yield rows, values
    _require_all(folder, description, len(done), damaged)


def _require_all(
    folder: Path, description: StatesDescription, n_done: int, damaged: Sequence[str] = ()
) -> None:
    if n_done < description.n_texts:
        names = f" (damaged: {', '.join(damaged)})" if damaged else ""
        raise StatesError(
            f"Got {folder} with the states of {n_done} of {description.n_texts} texts"
            f"{names}, but expected all of them. "
            "Run the same collection again; it continues."
        )


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
    raise StatesError(
        f"Got {path} of {found}, but expected {_FORMAT}. Another release wrote it: name another "
        "folder, or remove this one and collect the states again."
    )


def _empty_values(description: StatesDescription, device: str) -> torch.Tensor:
    shape = (description.n_texts, len(description.layers), description.model.width)
    return torch.empty(shape, dtype=getattr(torch, description.dtype), device=device)


def _row_bytes(description: StatesDescription) -> int:
    dtype = getattr(torch, description.dtype)
    return len(description.layers) * description.model.width * dtype.itemsize


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(_SHARDS))


def _read_shard(path: Path, description: StatesDescription) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a shard and their values.

    Raises
    ------
    StatesError
        If it is cut short, altered, or of another collection.
    """
    try:
        shard, about = load_tensor_file(path, _SHARD_KIND)
        rows, values = shard["rows"], shard["values"]
    except (PackError, KeyError) as error:
        raise StatesError(f"Got {path}, but expected a whole shard of states.") from error
    expected = _empty_values(description, "meta")
    fits = (values.shape, values.dtype) == ((len(rows), *expected.shape[1:]), expected.dtype)
    numbered = rows.dtype == torch.int64 and bool(((rows >= 0) & (rows < len(expected))).all())
    if about != description.to_dict() or not fits or not numbered:
        raise StatesError(f"Got {path}, but expected a shard of this collection.")
    return rows, values


def _damaged_shards(folder: Path, description: StatesDescription) -> Iterable[Path]:
    for path in _shards(folder):
        try:
            _read_shard(path, description)
        except StatesError:
            yield path


def _saved_rows(folder: Path) -> set[int]:
    """Return the rows in shards that are known to be whole, without reading the states."""
    saved: set[int] = set()
    for path in _shards(folder):
        with safe_open(path, framework="pt") as file:
            saved.update(file.get_tensor("rows").tolist())
    return saved
