"""expertsteer inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from expertsteer.cli.options import Json, PlotFile
from expertsteer.cli.show import answer, pairs_table, print_json, say
from expertsteer.errors import ParameterError
from expertsteer.layer_pair import LayerPair

__all__ = ["inspect"]


def inspect(
    path: Annotated[Path, typer.Argument(help="A pack, an alignment, or a folder of states.")],
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Tell all that a pack, an alignment or saved states hold.

    Example: expertsteer inspect happy.safetensors
    """
    import yaml

    from expertsteer.artifacts import STATES_KIND, describe_artifact
    from expertsteer.tensor_file import complete_description

    kind, summary = describe_artifact(path)
    if plot:
        _plot(path, kind, plot)
    if as_json:
        print_json(summary)
        return
    # All of it before anything is printed: the description may lack something.
    with complete_description(path):
        shown = [_model_table(role, summary[role]) for role in _ROLES if summary.get(role)]
        if kind == STATES_KIND:
            rest = {key: value for key, value in summary.items() if key != "model"}
        else:
            shown += _pairs_shown(kind, summary)
            rest = {"provenance": summary["provenance"]}
    answer.print(f"[bold]{escape(str(path))}[/bold]: {kind.replace('-', ' ')}")
    for part in shown:
        answer.print(part)
    answer.print(yaml.safe_dump(rest, sort_keys=False, allow_unicode=True).rstrip(), markup=False)


_ROLES = ("target", "expert", "model")


def _plot(path: Path, kind: str, plot: Path) -> None:
    from expertsteer.tensor_file import ALIGNMENT_KIND

    if kind != ALIGNMENT_KIND:
        raise ParameterError(f"Got --plot for {path}, but only alignments hold an MI table.")
    from expertsteer.alignment import Alignment
    from expertsteer.plots import plot_information

    alignment = Alignment.load(path)
    plot_information(alignment.mutual_information, alignment.pairs, plot)
    say(f"picture written to {plot}")


def _pairs_shown(kind: str, summary: dict[str, Any]) -> list[str | Table]:
    from expertsteer.tensor_file import PACK_KIND

    shown: list[str | Table] = []
    if kind == PACK_KIND:
        shown = [
            f"proposed strength: {summary['strength']:g} × mean residual norm",
            f"steers the layers {', '.join(map(str, summary['layers']))}",
        ]
    pairs = [LayerPair(**pair) for pair in summary["pairs"]]
    norms = {int(layer): norm for layer, norm in summary["mean_residual_norms"].items()}
    return [*shown, pairs_table(pairs, norms)]


def _model_table(role: str, fields: dict[str, Any]) -> Table:
    table = Table(title=role, title_justify="left", show_header=False)
    for key, value in fields.items():
        table.add_row(key, "–" if value is None else escape(str(value)))
    return table
