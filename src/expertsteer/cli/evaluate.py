"""expertsteer evaluate."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.config import write_config
from expertsteer.cli.show import answer, evaluation_tables, print_json, say

__all__ = ["evaluate"]


class SplitName(str, Enum):
    """Splits that can be evaluated."""

    test = "test"
    validation = "validation"
    train = "train"


def evaluate(
    context: typer.Context,
    target: options.TargetModel,
    data: options.DataFile,
    output: options.OutputFolder = Path("evaluation"),
    pack: Annotated[
        Path | None, typer.Option("--pack", "-p", help="A pack; default: the target as it is.")
    ] = None,
    strengths: Annotated[
        list[float] | None,
        typer.Option("--strength", "-s", help="Repeatable; default: the pack's own."),
    ] = None,
    positions: options.SteeredPositions = options.Positions.all,
    split: Annotated[
        SplitName, typer.Option(help="Figures come from test, choices from validation.")
    ] = SplitName.test,
    letters: Annotated[
        bool, typer.Option("--letters", help="Also ask for the letter of the answer.")
    ] = False,
    text: options.TextFile = None,
    n_plain: Annotated[
        int,
        typer.Option(min=0, help="Plain texts for perplexity and divergence; 0 leaves them out."),
    ] = 100,
    columns: options.ColumnOption = None,
    limit: options.Limit = None,
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
    """Evaluate a target on questions, unsteered and steered, and the damage to plain text.

    Example: expertsteer evaluate -t gemma-3-270m -d arc_easy.jsonl -p science.safetensors
    -s 0.05 -s 0.1 -o arc

    Questions are multiple choice or answered by yes or no, scored by log-likelihood as lm-eval
    does. The folder gets a row an item; the same command continues an interrupted run.
    """
    from expertsteer.data import load_plain_text
    from expertsteer.errors import ParameterError
    from expertsteer.evaluation.run import evaluate as evaluate_target
    from expertsteer.models import load_model
    from expertsteer.pack import SteeringPack
    from expertsteer.steering import check_strength

    wanted = [check_strength(value) for value in strengths or []]
    if wanted and pack is None:
        raise ParameterError("Got --strength without a pack, but expected one to steer with.")
    known = SteeringPack.load(pack) if pack else None
    examples = options.load_data(
        data, columns=columns, positive=None, negative=None, limit=None, seed=seed
    )
    plain = load_plain_text(text)[:n_plain] if n_plain else []
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    model = load_model(loading.source(target, target_revision))
    result = evaluate_target(
        model,
        examples,
        output,
        pack=known,
        strengths=wanted,
        positions=positions.value,
        split=split.value,
        limit=limit,
        letters=letters,
        chat_template=chat_template,
        plain_text=plain,
        seed=seed,
        force=force,
    )
    write_config(context, output / "evaluate")
    if as_json:
        print_json(result.to_dict())
    else:
        answer.print(evaluation_tables(result))
        say(f"rows and summary: {output}")
