"""The command line: one function a command, each a few calls into the package."""

import sys
from typing import Annotated

import typer

from expertsteer import __version__
from expertsteer.cli.align import align
from expertsteer.cli.calibrate import calibrate
from expertsteer.cli.chat import chat
from expertsteer.cli.collect import collect
from expertsteer.cli.compare import compare
from expertsteer.cli.demo import demo
from expertsteer.cli.evaluate import evaluate
from expertsteer.cli.export import export
from expertsteer.cli.fit import fit
from expertsteer.cli.generate import generate
from expertsteer.cli.import_ import import_
from expertsteer.cli.inspect import inspect
from expertsteer.cli.launch import (
    TERMINATED,
    check_command,
    join_launch,
    leave_launch,
    stop_listening,
    was_terminated,
)
from expertsteer.cli.running import INTERRUPTED, Outcome, add_command, report, run
from expertsteer.cli.serve import serve
from expertsteer.cli.show import say, warnings_as_messages
from expertsteer.cli.study import study
from expertsteer.cli.transfer import transfer

__all__ = ["app", "main"]

_SIGTERM = (
    "Got SIGTERM from the launcher, which sends it when another process has ended early. What is "
    "done is kept; start the same command again, and it goes on from there."
)

app = typer.Typer(
    name="expertsteer",
    help="Steer a language model with vectors taken from another one, at inference and without "
    "touching its weights.\n\nStart with [bold]expertsteer demo[/bold]. The usual way is "
    "[bold]fit[/bold] (target + expert + labelled texts → a pack), then [bold]generate[/bold] or "
    "[bold]chat[/bold].",
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Their modules do without `from __future__ import annotations`: Typer would compile every
# annotation anew, several times a command.
_COMMANDS = (
    *(fit, calibrate, generate, chat, serve, compare, evaluate, study),
    *(inspect, collect, align, transfer, export, import_, demo),
)
for command in _COMMANDS:
    add_command(app, command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expertsteer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    warnings_as_messages()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
    check_command(context.invoked_subcommand)


def main() -> None:
    """Run the command line.

    Exits with 0 for success, 1 for an error, 2 for wrong usage, 130 for Ctrl-C and 143
    where a launcher ended it.
    """
    try:
        outcome = _outcome()
        if outcome.code == INTERRUPTED and was_terminated():
            outcome = Outcome(TERMINATED, error=_SIGTERM)
        code = report(outcome)
        if code == INTERRUPTED:
            say("interrupted; what is saved is kept, and the same command goes on from there")
    finally:
        leave_launch()
    sys.exit(code)


def _outcome() -> Outcome:
    # A signal may come at any line; wherever that is, it is reported once and no error twice.
    try:
        join_launch()
        outcome = run(app)
        stop_listening()
    except KeyboardInterrupt:
        stop_listening()
        outcome = Outcome(INTERRUPTED)
    return outcome
