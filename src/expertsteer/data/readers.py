"""Read rows from JSON lines, CSV, Parquet, a benchmark or a Hugging Face data set."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertsteer.data.benchmarks import BENCHMARKS, Benchmark, complete_splits
from expertsteer.data.splits import Row
from expertsteer.errors import DataError

__all__ = ["TABLE_SUFFIXES", "read_rows", "read_text"]

# Names the folder of local copies of the benchmarks.
_FOLDER_VARIABLE = "EXPERTSTEER_BENCHMARKS"

# Of files with rows and named columns.
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(source: str | Path, folder: str | Path | None = None) -> list[Row]:
    """Read the rows of a file, a benchmark or a data set.

    Parameters
    ----------
    source : str or Path
        A ``.jsonl``, ``.json`` (lines, or one array), ``.csv`` or ``.parquet`` file; the name
        of one of the `BENCHMARKS`; or a Hugging Face data set, "owner/name" or
        "owner/name:config", all of its splits.
    folder : str or Path, optional
        Where local copies of the benchmarks are: "<folder>/**/<name>.jsonl" is read in place
        of the hub. Default: the environment variable ``EXPERTSTEER_BENCHMARKS``.

    Returns
    -------
    list of (str, dict)
        Each row with where it stands, such as "data.jsonl:3".

    Raises
    ------
    DataError
        If the source is missing, unknown, unreadable or empty, or a line is not what it
        should be.
    """
    path = Path(source).expanduser()
    # A benchmark's name first: an output folder is easily called the same.
    if benchmark := BENCHMARKS.get(str(source)):
        rows = _read_benchmark(benchmark, folder or os.environ.get(_FOLDER_VARIABLE))
    elif path.is_dir():
        raise DataError(f"Got {path}, which is a folder, but expected a file.")
    elif path.suffix.lower() in TABLE_SUFFIXES or path.exists():
        rows = list(_read_file(path))
    else:
        rows = list(_read_hub(str(source)))
    if not rows:
        raise DataError(f"Got {source}, which is empty, but expected at least one row.")
    return rows


def read_text(path: str | Path) -> str:
    """Return a UTF-8 file's text.

    Raises
    ------
    DataError
        If the file is missing, unreadable or not UTF-8.
    """
    path = Path(path).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"Got {path}, but there is no such file.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"Got {path}, which is not UTF-8 at byte {error.start}. Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error


def _read_file(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    if suffix == ".csv":
        return _read_csv(path, text)
    if suffix in (".jsonl", ".json"):
        return _read_json(path, text)
    raise DataError(f"Got {path}, but expected one of {', '.join(TABLE_SUFFIXES)}.")


def _read_json(path: Path, text: str) -> Iterator[Row]:
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        values = _parse(text, str(path))
        lines = [(f"{path}, element {n}", value) for n, value in enumerate(values, start=1)]
    else:
        lines = [
            (f"{path}:{n}", _parse(line, f"{path}:{n}"))
            for n, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for place, value in lines:
        if not isinstance(value, dict):
            raise DataError(
                f"{place}: got {type(value).__name__}, but expected an object with named fields."
            )
        yield place, value


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}). Mend or remove it."
        ) from error


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(), which also breaks at characters that texts may hold, such as U+2028.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.line_num}: got another number of fields than the header's "
                    f"{len(reader.fieldnames or [])}."
                )
            yield f"{path}:{reader.line_num}", dict(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}).") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"Reading {path} needs pyarrow ({error}). Install it with: "
            'pip install "expertsteer[data]"'
        ) from error
    try:
        rows = pq.read_table(path).to_pylist()
    except FileNotFoundError as error:
        raise DataError(f"Got {path}, but there is no such file.") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"Got {path}, but it is not readable Parquet ({error}).") from error
    for n, row in enumerate(rows, start=1):
        yield f"{path}, row {n}", row


def _read_benchmark(benchmark: Benchmark, folder: str | Path | None) -> list[Row]:
    if folder:
        rows = list(_read_file(_local_copy(benchmark.name, Path(folder).expanduser())))
    elif benchmark.hub is None:
        raise DataError(
            f"Got the benchmark {benchmark.name}, which has no known place on the hub. Give a "
            f"file, or set {_FOLDER_VARIABLE} to a folder with {benchmark.name}.jsonl."
        )
    else:
        hub, rows = benchmark.hub, []
        for config in hub.configs or ("",):
            for split, loaded in _load_hub(hub.repository, config, hub.file).items():
                rows += hub.convert_rows(benchmark.name, config, split, loaded)
        rows = complete_splits(rows)
    return [
        (place, row | {field: row.get(column) for field, column in benchmark.columns.items()})
        for place, row in rows
    ]


def _local_copy(name: str, folder: Path) -> Path:
    found = sorted(folder.rglob(f"{name}.jsonl"))
    if len(found) != 1:
        raise DataError(
            f"Got {folder} as the folder of local benchmarks, with {len(found)} files "
            f"{name}.jsonl, but expected one. Mend the folder, or unset {_FOLDER_VARIABLE} to "
            "read the hub."
        )
    return found[0]


def _read_hub(name: str) -> Iterator[Row]:
    repository, _, config = name.partition(":")
    # ".tsv" is a missing file's, not to be asked for on the hub; ".5" may be a version.
    if (
        repository.count("/") != 1
        or repository.startswith((".", "/", "~"))
        or Path(repository).suffix[1:].isalpha()
    ):
        raise DataError(
            f"Got {name}, but there is no such file. Expected a .jsonl, .csv or .parquet file, a "
            f"hub data set (owner/name), or one of the benchmarks {', '.join(BENCHMARKS)}."
        )
    for split, rows in _load_hub(repository, config).items():
        for n, row in enumerate(rows, start=1):
            yield f"{name}, {split} row {n}", {"split": str(split)} | dict(row)


def _load_hub(repository: str, config: str, file: str = "") -> Any:
    name = f"{repository}:{config}" if config else repository
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"Reading the data set {name!r} needs the package datasets ({error}). Install it with: "
            'pip install "expertsteer[data]"'
        ) from error
    try:
        return datasets.load_dataset(repository, config or None, data_files=file or None)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"Cannot load the data set {name!r}: {reason}") from error
