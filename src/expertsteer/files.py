"""Write files whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from expertsteer.errors import ExpertSteerError, ParameterError

__all__ = [
    "is_finished",
    "read_yaml",
    "replacing",
    "replacing_folder",
    "require_writable",
    "write_text",
]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of ``path`` when all went well.

    Parameters
    ----------
    path : str or Path
        The file to write; its folder is made if missing.

    Yields
    ------
    Path
        A fresh name in the same folder.

    Raises
    ------
    ExpertSteerError
        If the folder cannot be made or written.
    """
    path = Path(path)
    scratch = _scratch_beside(path)
    try:
        yield scratch
        scratch.chmod(0o666 & ~_umask())
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when all went well.

    Parameters
    ----------
    path : str or Path
        A folder that is not there yet, or empty; the one above it is made if missing.
    overwrite : bool, default=False
        Whether it may be there and hold something, which is gone afterwards.

    Yields
    ------
    Path
        An empty folder beside it.

    Raises
    ------
    ExpertSteerError
        If the folder above cannot be made or written, or ``path`` holds something by the
        time of the move.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield scratch
        for made in (scratch, *scratch.rglob("*")):
            made.chmod((0o777 if made.is_dir() else 0o666) & ~_umask())
        if overwrite and path.is_dir():
            _exchange_folders(scratch, path)
        else:
            os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange_folders(made: Path, path: Path) -> None:
    # A folder cannot take the place of one that holds something, so the old one steps aside.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.replace(path, aside / path.name)
        try:
            os.replace(made, path)
        except OSError:
            os.replace(aside / path.name, path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_finished(folder: str | Path, record: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a folder holds the finished work of some settings.

    Parameters
    ----------
    folder : str or Path
        Made by `replacing_folder`, so that it is there only when finished.
    record : str
        The JSON file in it whose field ``settings`` tells what it was made with.
    settings : mapping of str to JSON types

    Returns
    -------
    bool
        False where the work is to be done and its place can be written.

    Raises
    ------
    ExpertSteerError
        If the folder holds something else, is a file, or cannot be made.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ExpertSteerError(f"Cannot write the folder {folder}: it is a file.")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            known = json.loads((folder / record).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExpertSteerError(
                f"Got the folder {folder}, which holds something else, but expected a new one. "
                "Name another folder."
            ) from error
        differences = _differences(known, json.loads(json.dumps(settings)))
        if differences:
            raise ExpertSteerError(
                f"Got the folder {folder}, which was made with other settings ("
                f"{'; '.join(differences)}). Name another folder, or remove it."
            )
        return True
    require_writable(folder.parent / f"{folder.name}.json")
    return False


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = sorted(known.keys() | wanted.keys())
    return [
        f"{name}: {known.get(name)!r} instead of {wanted.get(name)!r}"
        for name in names
        if known.get(name) != wanted.get(name)
    ]


def _umask() -> int:
    # tempfile makes things private; what replaces a normal file should be one.
    umask = os.umask(0)
    os.umask(umask)
    return umask


def require_writable(path: str | Path) -> None:
    """Raise unless a file can be written, before the work whose result it will hold.

    Parameters
    ----------
    path : str or Path
        Nothing is left behind, and a file that is there stays as it is.

    Raises
    ------
    ExpertSteerError
        If the folder cannot be made or written, or the path is a folder.
    """
    path = Path(path)
    _refuse_folder(path)
    # A missing folder can be made where the nearest one above it can be written.
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=above)
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(handle)
    Path(name).unlink()


def _refuse_folder(path: Path) -> None:
    if os.path.isdir(path):  # unlike Path's own, False for a name that is too long
        raise ExpertSteerError(f"Cannot write {path}: it is a folder.")


def _scratch_beside(path: Path) -> Path:
    _refuse_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(handle)
    return Path(name)


def _cannot_write(path: Path, error: OSError | SafetensorError) -> ExpertSteerError:
    # safetensors has an error of its own for a full disk, among others.
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    reason = reason or type(error).__name__
    return ExpertSteerError(f"Cannot write {path}: {reason}.")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def read_yaml(path: Path, what: str, keys: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Parameters
    ----------
    path : Path
    what, keys : str
        What the file is and what its keys are, for messages.

    Raises
    ------
    ParameterError
        If the file is missing, unreadable, or no YAML mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"Cannot read the {what} {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ParameterError(f"Got {path}, but it is not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ParameterError(f"Got {path}, but expected a mapping of {keys} to values.")
    return values
