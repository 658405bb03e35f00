"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertsteer.errors import ExpertSteerError

__all__ = ["replacing", "write_text"]


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ExpertSteerError(f"Cannot write {path}: {error.strerror}.") from error
    scratch = Path(name)
    try:
        yield scratch
        # mkstemp makes files private; what replaces a normal file should be one.
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)
        if path.is_dir():
            raise ExpertSteerError(f"Cannot write {path}: it is a folder.")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
