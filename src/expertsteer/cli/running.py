"""Run a typer application: a user's mistake is one line and an exit code."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from expertsteer.cli.show import print_error, say
from expertsteer.errors import ExpertSteerError

__all__ = ["INTERRUPTED", "Outcome", "add_command", "report", "run", "run_script"]

# What shells and typer make of Ctrl-C.
INTERRUPTED = 130
# The CPU's allocator and those of accelerators have no class in common.
_OUT_OF_MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)
# Typer has moved click's errors between releases; this way to them stays.
_UsageError: Any = typer.BadParameter.__base__


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes
    ----------
    code : int
        Exit code: 0, or what the command chose; 2 for wrong usage, 1 for other errors.
    error, hint : str or None
        What is to be said of it.
    """

    code: int
    error: str | None = None
    hint: str | None = None


def add_command(app: typer.Typer, command: Callable[..., None]) -> None:
    """Make a function a command, whose help breaks its lines where the terminal ends."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    shown = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(command.__name__.rstrip("_"), help=shown)(command)


def run(app: typer.Typer) -> Outcome:
    """Run an application on the command line's arguments; nothing is said of an error yet.

    Parameters
    ----------
    app : typer.Typer

    Returns
    -------
    Outcome
    """
    try:
        # Not standalone: typer would draw a frame around wrong usage, and an error is one line.
        return Outcome(app(standalone_mode=False) or 0)
    except _UsageError as error:
        hint = f"{error.ctx.command_path} --help shows what it takes" if error.ctx else None
        # typer has pydantic check values, whose messages begin with the kind of the error.
        return Outcome(2, error.format_message().replace("Value error, ", ""), hint)
    except ExpertSteerError as error:
        return Outcome(1, str(error))
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for what the CPU's memory cannot hold.
        reason = str(error)
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(reason):
            raise
        said = f" ({' '.join(reason.split())[:200]})" if reason else ""
        return Outcome(
            1,
            f"Out of memory{said}. Use fewer layers or texts, a lower --dtype or a smaller model.",
        )


def report(outcome: Outcome) -> int:
    """Say what is to be said of an outcome and return its exit code."""
    if outcome.error is not None:
        print_error(outcome.error)
    if outcome.hint is not None:
        say(outcome.hint)
    return outcome.code


def run_script(command: Callable[..., None]) -> None:
    """Run a function of a script as a command of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    add_command(app, command)
    sys.exit(report(run(app)))
