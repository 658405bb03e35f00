"""expertsteer inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from expertsteer.cli.options import Json, PlotFile
from expertsteer.cli.show import answer, pairs_table, print_json, say

__all__ = ["inspect"]


def inspect(
    path: Annotated[Path, typer.Argument(help="A pack, an alignment, or a folder of states.")],
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Tell all that a pack, an alignment or saved states hold.

    Example: expertsteer inspect happy.safetensors
    """
    from expertsteer.alignment import Alignment
    from expertsteer.artifacts import open_artifact
    from expertsteer.errors import ParameterError
    from expertsteer.pack import SteeringPack

    artifact = open_artifact(path)
    if plot:
        if not isinstance(artifact, Alignment):
            raise ParameterError(f"Got --plot for {path}, but only alignments hold an MI table.")
        from expertsteer.plots import plot_information

        plot_information(artifact.mutual_information, artifact.pairs, plot)
        say(f"picture written to {plot}")
    summary = artifact.summary()
    if as_json:
        print_json(summary)
        return
    answer.print(f"[bold]{escape(str(path))}[/bold]: {_KINDS[type(artifact).__name__]}")
    for role in ("target", "expert", "model"):
        if summary.get(role):
            answer.print(_model_table(role, summary[role]))
    if isinstance(artifact, SteeringPack):
        answer.print(f"proposed strength: {artifact.strength:g} × mean residual norm")
        answer.print(f"steers the layers {', '.join(map(str, artifact.layers))}")
    if isinstance(artifact, SteeringPack | Alignment):
        answer.print(pairs_table(artifact.pairs, artifact.mean_residual_norms))
        rest = {"provenance": artifact.provenance}
    else:
        rest = {key: value for key, value in summary.items() if key != "model"}
    answer.print(yaml.safe_dump(rest, sort_keys=False, allow_unicode=True).rstrip(), markup=False)


_KINDS = {
    "SteeringPack": "steering pack",
    "Alignment": "alignment",
    "States": "saved states",
}


def _model_table(role: str, fields: dict[str, Any]) -> Table:
    table = Table(title=role, title_justify="left", show_header=False)
    for key, value in fields.items():
        table.add_row(key, "–" if value is None else escape(str(value)))
    return table
