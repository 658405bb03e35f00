"""expertsteer generate."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.show import answer, generation_table, print_json

__all__ = ["generate"]


def generate(
    target: options.TargetModel,
    packs: options.PackFiles,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; '-' reads them from standard input.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Prompts, one a line.")] = None,
    strengths: Annotated[
        list[float] | None,
        typer.Option(
            "--strength",
            "-s",
            help="Relative to the mean residual norm; negative steers away. Repeatable. "
            "Default: the first pack's.",
        ),
    ] = None,
    positions: options.SteeredPositions = options.Positions.all,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of continuations.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="As in transformers.")] = 1.0,
    chat_template: options.ChatTemplate = False,
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    target_revision: options.TargetRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> None:
    """Generate unsteered and steered, side by side.

    Example: expertsteer generate -t gemma-3-270m -p happy.safetensors -s 0.05 -s 0.1 "Today I"
    """
    from expertsteer.data import load_plain_lines
    from expertsteer.errors import ParameterError
    from expertsteer.generation import generate_side_by_side
    from expertsteer.models import load_model
    from expertsteer.pack import SteeringPack

    loaded = [SteeringPack.load(path) for path in packs]
    wanted = [loaded[0].resolve_strength(value) for value in strengths or [None]]
    texts = list(prompts or [])
    if texts == ["-"]:
        try:
            texts = [line.strip() for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise ParameterError(
                "Got prompts on standard input that are not UTF-8, but expected text. Convert them."
            ) from error
    if prompt_file:
        texts += load_plain_lines(prompt_file)
    if not texts:
        raise ParameterError(
            "Got no prompts, but expected some, or a file of them (--prompt-file)."
        )
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    model = load_model(loading.source(target, target_revision))
    for pack in loaded:
        pack.check_target(model, force=force)
    generations = generate_side_by_side(
        model,
        loaded,
        texts,
        wanted,
        positions=positions.value,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        chat_template=chat_template,
        seed=seed,
        force=force,
    )
    if as_json:
        print_json(
            [
                {"prompt": g.prompt, "strength": strength, "text": text}
                for g in generations
                for strength, text in g.continuations.items()
            ]
        )
    else:
        answer.print(generation_table(generations))
