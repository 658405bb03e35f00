"""expertsteer import."""

from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.config import refuse_overwriting, saved_with_config, write_config
from expertsteer.cli.show import print_json, say

__all__ = ["import_"]


def import_(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            help="A control vector of llama.cpp or repeng (.gguf), or a .svec of "
            "activation-steering and AISteer360.",
        ),
    ],
    target: options.TargetModel,
    output: options.OutputFile,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Plain text to measure the layers' residual norms on; default: one that comes "
            "along.",
            rich_help_panel="Data",
        ),
    ] = None,
    n_beginnings: options.NumberOfBeginnings = 300,
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    target_revision: options.TargetRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> None:
    """Make a pack of a steering vector that another program wrote.

    Example: expertsteer import happy.gguf --target gemma-3-270m -o happy

    At the pack's own strength it adds what the other program adds at its scale 1.
    """
    from expertsteer.export import import_pack

    refuse_overwriting(context, *saved_with_config(output))
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    texts = options.beginnings(text, n_beginnings, seed)
    pack = import_pack(file, loading.source(target, target_revision), texts)
    written = pack.save(output)
    write_config(context, written)
    if as_json:
        print_json(pack.summary() | {"path": str(written)})
    layers = ", ".join(map(str, pack.layers))
    say(f"pack for {pack.target.name}, layers {layers}, strength {pack.strength:.4g}: {written}")
