"""Where converted models and collected states are kept between runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from platformdirs import user_cache_path

from expertsteer.errors import ExpertSteerError

__all__ = ["cache_root", "require_disk"]


def cache_root() -> Path:
    """Return the cache folder: ``$EXPERTSTEER_CACHE`` or the platform's own place."""
    return Path(os.environ.get("EXPERTSTEER_CACHE") or user_cache_path("expertsteer"))


def require_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Raise before work starts if a folder cannot take what will be written to it.

    Parameters
    ----------
    folder : Path
        Where the files will go; created where missing.
    n_bytes : int
        How much will be written.
    what : str
        What it is, for the message.

    Raises
    ------
    ExpertSteerError
        If the folder cannot be made or written, or lacks the room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExpertSteerError(f"Cannot write {what} to {folder}: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ExpertSteerError(f"Cannot write {what} to {folder}: no permission to write there.")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ExpertSteerError(
            f"Writing {what} to {folder} takes {n_bytes / 1e9:.2f} GB, but only "
            f"{free / 1e9:.2f} GB are free. Free some room or name another folder."
        )
