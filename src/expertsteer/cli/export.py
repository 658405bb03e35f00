"""expertsteer export."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.config import refuse_overwriting
from expertsteer.cli.show import print_json, say

__all__ = ["export"]


class FormatName(str, Enum):
    """Formats of other programs, those of `expertsteer.export.FORMATS`."""

    gguf = "gguf"
    lm_eval = "lm-eval"
    weights = "weights"
    peft = "peft"
    torch = "torch"
    numpy = "numpy"


def export(
    context: typer.Context,
    pack: Annotated[Path, typer.Argument(help="The steering pack.")],
    to: Annotated[
        FormatName,
        typer.Option(
            help="gguf: control vector of llama.cpp; lm-eval: file of the harness's model "
            "steered; weights: ordinary checkpoint; peft: adapter; torch, numpy: plain arrays "
            "(.safetensors, .npz) and a JSON."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The file to write, its ending appended where missing; for weights and peft the "
            "folder.",
        ),
    ],
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            "-s",
            help="Relative to the layer's mean residual norm; default: the pack's own.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="The model, for weights and peft; default: the one the pack names.",
            rich_help_panel="Models",
        ),
    ] = None,
    dtype: options.Dtype = options.DtypeName.auto,
    target_revision: options.TargetRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is there.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a pack for another program, at one strength and for every token.

    Example: expertsteer export happy.safetensors --to gguf --strength 0.1 -o happy
    """
    from expertsteer.export import export_pack, written_files
    from expertsteer.pack import SteeringPack

    refuse_overwriting(context, *written_files(output, to.value))
    loaded = SteeringPack.load(pack)
    loading = options.Loading(dtype, None, None, None, trust_remote_code)
    exported = export_pack(
        loaded,
        output,
        to.value,
        strength=strength,
        target=loading.source(target or loaded.target.name, target_revision),
        force=force,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"path": str(exported.path), "description": exported.description})
    say(f"{exported.path} written: {exported.description}")
