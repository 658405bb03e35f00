"""Run a typer application: a user's mistake is one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from expertsteer.cli.show import print_error, say
from expertsteer.errors import ExpertSteerError

__all__ = ["run", "run_script"]

# Typer has moved click's errors between releases; this way to them stays.
_UsageError: Any = typer.BadParameter.__base__


def run(app: typer.Typer) -> int:
    """Run an application on the command line's arguments and return its exit code.

    Parameters
    ----------
    app : typer.Typer

    Returns
    -------
    int
        0, or what a command chose. Errors are printed and end the process: 2 for wrong
        usage, 1 for the rest.
    """
    try:
        # Not standalone: typer would draw a frame around wrong usage, and an error is one line.
        return app(standalone_mode=False) or 0
    except _UsageError as error:
        # typer has pydantic check values, whose messages begin with the kind of the error.
        print_error(error.format_message().replace("Value error, ", ""))
        if error.ctx:
            say(f"{error.ctx.command_path} --help shows what it takes")
        sys.exit(2)
    except ExpertSteerError as error:
        print_error(str(error))
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for what the CPU's memory cannot hold.
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print_error("Out of memory. Use fewer layers or texts, a lower --dtype or a smaller model.")
        sys.exit(1)


def run_script(command: Callable[..., None]) -> None:
    """Run a function of a script as a command of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    sys.exit(run(app))
