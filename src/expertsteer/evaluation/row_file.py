"""Files of JSON rows that an interrupted run continues: no row twice, none lost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from expertsteer.errors import DataError
from expertsteer.files import write_text
from expertsteer.models.cache import require_disk

__all__ = ["RowFile", "claim_folder", "read_json_lines"]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines; a last line cut short by a kill is left out.

    Raises
    ------
    DataError
        If another line than the last is not JSON, or there is no such file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"Got {path} with a damaged line {number}, but expected JSON. Remove that "
                "line; its item is computed again."
            ) from error
    return rows


class RowFile:
    """JSON lines that are written as they come.

    Parameters
    ----------
    path : Path
        Made if missing. A last line that a kill cut short is dropped.

    Attributes
    ----------
    rows : list of dict
        All rows, those of earlier runs first.

    Raises
    ------
    DataError
        If another line than the last is not JSON.
    """

    def __init__(self, path: Path) -> None:
        require_disk(path.parent, 0, "rows")
        self.rows: list[dict[str, Any]] = read_json_lines(path) if path.exists() else []
        whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows and bring them to the disk."""
        new = list(rows)
        self.rows += new
        self._file.write("".join(json.dumps(row) + "\n" for row in new).encode())
        self._file.flush()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()


def claim_folder(folder: Path, provenance: dict[str, Any]) -> None:
    """Note in ``run.json`` whose folder this is.

    Parameters
    ----------
    folder : Path
    provenance : dict
        What decides the rows.

    Raises
    ------
    DataError
        If the folder holds another run.
    """
    path = folder / "run.json"
    # As JSON has it: tuples have become lists.
    wanted = json.loads(json.dumps(provenance))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_text(path, json.dumps(wanted, indent=2))
        return
    except ValueError as error:
        raise DataError(f"Got {path}, but expected JSON. Name another folder.") from error
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise DataError(
            f"Got the folder {folder} of another run ({', '.join(differing)} differ), but expected "
            "an empty one or the same run's. Name another folder or remove this one."
        )
