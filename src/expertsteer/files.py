"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertsteer.errors import ExpertSteerError

__all__ = ["replacing", "require_writable", "write_text"]


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
        # mkstemp makes files private; what replaces a normal file should be one.
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)
        os.replace(scratch, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        scratch.unlink(missing_ok=True)


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


def _cannot_write(path: Path, error: OSError) -> ExpertSteerError:
    return ExpertSteerError(f"Cannot write {path}: {error.strerror or error}.")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
