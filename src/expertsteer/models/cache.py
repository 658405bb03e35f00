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
        raise _not_writable(folder, what, str(error.strerror)) from error
    if not os.access(folder, os.W_OK):
        raise _not_writable(folder, what, "no permission to write there")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ExpertSteerError(
            f"Got {free / 1e9:.2f} GB of free disk in {folder}, but expected "
            f"{n_bytes / 1e9:.2f} GB for {what}. Free some room or name another folder."
        )


def _not_writable(folder: Path, what: str, reason: str) -> ExpertSteerError:
    return ExpertSteerError(
        f"Got the folder {folder} for {what}, but expected one that can be written ({reason}). "
        "Name another folder."
    )
