"""expertsteer chat."""

import sys
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.show import answer, print_error, progress, say

__all__ = ["chat"]

_HELP = "/strength X steers by X, /off and /on switch steering, /new forgets, /quit leaves."


def chat(
    target: options.TargetModel,
    packs: options.PackFiles,
    strength: Annotated[
        float | None,
        typer.Option("--strength", "-s", help="Default: the first pack's."),
    ] = None,
    positions: options.SteeredPositions = options.Positions.all,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of answers.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    target_revision: options.TargetRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    seed: options.Seed = 0,
    config: options.ConfigFile = None,
) -> None:
    """Talk with a steered model; a model without a chat template continues your text.

    Example: expertsteer chat -t smollm2-135m-instruct -p happy.safetensors -s 0.08
    """
    from expertsteer.chatting import Conversation
    from expertsteer.errors import ExpertSteerError
    from expertsteer.models import load_model
    from expertsteer.pack import SteeringPack

    loaded = [SteeringPack.load(path) for path in packs]
    own_strength = loaded[0].resolve_strength(strength)
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    conversation = Conversation(
        load_model(loading.source(target, target_revision)),
        loaded,
        strength=own_strength,
        positions=positions.value,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        force=force,
    )
    say(_HELP)
    while True:
        try:
            # Piped input needs no prompt, and errors then keep lines of their own.
            line = progress.input("[bold]you:[/bold] " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        name, _, value = line.partition(" ")
        try:
            if name == "/quit":
                break
            if name == "/strength":
                conversation.set_strength(value)
            elif name in ("/on", "/off"):
                conversation.steered = name == "/on"
            elif name == "/new":
                conversation.forget()
            elif name.startswith("/"):
                say(_HELP)
            elif line:
                for piece in conversation.reply(line):
                    answer.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                answer.print()
        except ExpertSteerError as error:
            print_error(str(error))
