"""Files of JSON rows that an interrupted run continues: no row twice, none lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from expertsteer.errors import DataError, ExpertSteerError
from expertsteer.files import write_text
from expertsteer.models.cache import require_disk
from expertsteer.processes import is_main_process, process_index, wait_for_all

__all__ = [
    "RowFile",
    "SharedRows",
    "claim_folder",
    "done_by_strength",
    "read_json_lines",
    "strengths_left",
]


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
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in new).encode())
            self._file.flush()
        except OSError as error:
            raise ExpertSteerError(
                f"Cannot write {self._file.name}: {error.strerror}. Rows that were written before "
                "are kept, and the same command goes on from them."
            ) from error

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *details: object) -> None:
        # What a full disk did not take cannot be written on closing either.
        with suppress(OSError):
            self._file.close()


class SharedRows:
    """Rows that several processes write, each to a file of its own, and all read at the end.

    Parameters
    ----------
    path : Path
        The file of all rows. Until `gather`, the processes but the main one write beside it:
        ``rows.2.jsonl`` and so on in place of ``rows.jsonl``. What a run that died left
        there is taken over.
    keep : callable, optional
        Which rows of earlier runs count; the others are removed.

    Attributes
    ----------
    rows : list of dict
        Those of earlier runs, the same for every process; after `gather` all rows.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        self.path = path
        require_disk(path.parent, 0, "rows")
        if is_main_process():
            self._take_over()
            found = read_json_lines(path)
            kept = found if keep is None else [row for row in found if keep(row)]
            if len(kept) < len(found):
                self._write(kept)
        wait_for_all("reading the rows of earlier runs")
        self.rows: list[dict[str, Any]] = read_json_lines(path) if path.exists() else []
        # Nobody writes before all have read what is there: shares are dealt by it.
        wait_for_all("reading the rows of earlier runs")
        own = path if is_main_process() else self._beside(process_index())
        self._file = RowFile(own)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to this process's file and bring them to the disk."""
        self._file.add(rows)

    def gather(self, place: Callable[[dict[str, Any]], Any], doing: str) -> list[dict[str, Any]]:
        """Wait for all processes and return the rows of all, in order.

        Parameters
        ----------
        place : callable
            Sorts the rows: the same order whatever was interrupted and whoever wrote them.
        doing : str
            What the processes have done, for the message where one of them has ended.
        """
        self._file.__exit__()
        wait_for_all(doing)
        if is_main_process():
            self._take_over()
            found = read_json_lines(self.path)
            ordered = sorted(found, key=place)
            if ordered != found:
                self._write(ordered)
        wait_for_all(doing)
        self.rows = read_json_lines(self.path)
        return self.rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _beside(self, index: int) -> Path:
        return self.path.with_suffix(f".{index + 1}{self.path.suffix}")

    def _take_over(self) -> None:
        left = sorted(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))
        with RowFile(self.path) as file:
            for path in left:
                file.add(read_json_lines(path))
                path.unlink()

    def __enter__(self) -> SharedRows:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.__exit__(*details)


def done_by_strength(
    rows: Iterable[dict[str, Any]], strengths: Iterable[float], item: str
) -> dict[float, set[Any]]:
    """Return which items have a row, by strength; ``item`` is the field that names them."""
    done: dict[float, set[Any]] = {strength: set() for strength in strengths}
    for row in rows:
        if row["strength"] in done:
            done[row["strength"]].add(row[item])
    return done


def strengths_left(done: Mapping[float, set[Any]], items: Iterable[Any]) -> list[float]:
    """Return the strengths at which some of these items have no row."""
    wanted = set(items)
    return [strength for strength, found in done.items() if not wanted <= found]


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
