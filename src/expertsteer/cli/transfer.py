"""expertsteer transfer."""

from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.config import refuse_overwriting, saved_with_config, write_config
from expertsteer.cli.show import answer, pairs_table, print_json, say

__all__ = ["transfer"]


def transfer(
    context: typer.Context,
    vector: Annotated[
        Path,
        typer.Argument(
            help="A pack made for the expert, or a plain vector: .npy, or .safetensors with one "
            "tensor."
        ),
    ],
    alignment: Annotated[
        Path, typer.Option("--alignment", "-a", help="The alignment to carry it with.")
    ],
    output: options.OutputFile = Path("transferred.safetensors"),
    layer: Annotated[
        int | None,
        typer.Option(help="The expert's block a plain vector belongs to (0-based)."),
    ] = None,
    target_layers: Annotated[
        list[int] | None,
        typer.Option(
            "--target-layer",
            help="Where to steer; default: wherever the alignment leads. Repeatable.",
        ),
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> None:
    """Carry a steering vector of the expert into the target, without any example.

    Example: expertsteer transfer honesty.npy --layer 18 --alignment a-to-b.safetensors -o honesty
    """
    from expertsteer.alignment import Alignment
    from expertsteer.vectors import load_vector

    refuse_overwriting(context, *saved_with_config(output))
    pack = Alignment.load(alignment).transfer(
        load_vector(vector), expert_layer=layer, target_layers=target_layers, force=force
    )
    path = pack.save(output)
    write_config(context, path)
    if as_json:
        print_json(pack.summary() | {"path": str(path)})
        return
    answer.print(pairs_table(pack.pairs, pack.mean_residual_norms))
    say(f"pack for {pack.target.name} written to {path}")
