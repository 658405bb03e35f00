"""One run at a time in a folder; the next one waits and says for whom."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from expertsteer.errors import ExpertSteerError
from expertsteer.files import write_text
from expertsteer.processes import is_main_process, wait_for_all

__all__ = ["locked", "try_lock"]

_LOCK = ".lock"
_HOLDER = ".holder.json"
_POLL_SECONDS = 1.0


def try_lock(folder: Path) -> FileLock | None:
    """Return a folder's lock, held, or None where another run holds it.

    Raises
    ------
    ExpertSteerError
        If the lock cannot be opened, such as another user's.
    """
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise ExpertSteerError(
            f"Cannot lock {folder}: {error.strerror} ({folder / _LOCK}). Name a folder that you "
            "can write, or have its owner let you."
        ) from error
    return lock


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep other runs out of a folder; where one is in it, wait until that has ended.

    Of a run on several processes the main process holds the lock for all of them. A run
    that dies leaves nothing locked.

    Parameters
    ----------
    folder : Path
        It exists and can be written. ``.lock`` stays in it; ``.holder.json`` is there
        while it is locked and says who holds it.
    what : str
        What the folder holds, for messages.

    Warns
    -----
    UserWarning
        When it has to wait: names the host, process and command of the other run.

    Raises
    ------
    ExpertSteerError
        As in `try_lock`.
    """
    if not is_main_process():
        wait_for_all(f"waiting for the {what}")
        yield
        return
    lock = try_lock(folder)
    if lock is None:
        warnings.warn(
            f"{folder} is in use: {_holder(folder)} works on the {what}. Waiting for it to end.",
            stacklevel=3,
        )
        lock = FileLock(folder / _LOCK)
        lock.acquire(poll_interval=_POLL_SECONDS)
    holder = folder / _HOLDER
    try:
        write_text(holder, json.dumps(_myself()))
        wait_for_all(f"waiting for the {what}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": shlex.join(sys.argv)}


def _holder(folder: Path) -> str:
    try:
        about = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']} ({about['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which is just about to say who it is
