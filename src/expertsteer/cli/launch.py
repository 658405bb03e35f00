"""Commands that torchrun or accelerate launch starts in several processes."""

from __future__ import annotations

import signal
from typing import Any

from expertsteer.cli.show import quieten
from expertsteer.errors import ParameterError
from expertsteer.processes import is_launched, is_main_process, leave, n_processes

__all__ = [
    "TERMINATED",
    "check_command",
    "join_launch",
    "leave_launch",
    "stop_listening",
    "was_terminated",
]

# What shells make of SIGTERM.
TERMINATED = 143
_SHARED = ("fit", "align", "evaluate", "collect")
_terminated = False


def join_launch() -> None:
    """Take part in a launch on several processes, if this is one: all but the main keep quiet.

    A launcher that has lost a process sends SIGTERM to the others; until `stop_listening` it
    becomes a KeyboardInterrupt, so that what is done is kept as it is on Ctrl-C.
    """
    if is_launched():
        signal.signal(signal.SIGTERM, _terminate)
        if not is_main_process():
            quieten()


def stop_listening() -> None:
    """Let a SIGTERM change nothing any more: how this process ends is settled."""
    if is_launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave_launch() -> None:
    """End the connections to the other processes, and leave SIGTERM to itself again."""
    if is_launched():
        leave()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check_command(command: str | None) -> None:
    """Raise for a command whose work is not shared among processes."""
    if is_launched() and command is not None and command not in _SHARED:
        raise ParameterError(
            f"Got {n_processes()} processes for {command}, but expected one: only "
            f"{', '.join(_SHARED)} share their work. Start it without a launcher."
        )


def was_terminated() -> bool:
    """Return whether the launcher has asked this process to end."""
    return _terminated


def _terminate(*_: Any) -> None:
    global _terminated
    if not _terminated:
        _terminated = True
        raise KeyboardInterrupt
