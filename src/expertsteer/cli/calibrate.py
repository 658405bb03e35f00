"""expertsteer calibrate."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.config import refuse_overwriting, saved_with_config, write_config
from expertsteer.cli.show import answer, calibration_table, print_json, say

__all__ = ["calibrate"]


class DamageName(str, Enum):
    """What a damage budget can be of."""

    perplexity = "perplexity"
    divergence = "divergence"


def calibrate(
    context: typer.Context,
    target: options.TargetModel,
    pack: Annotated[Path, typer.Option("--pack", "-p", help="The pack to calibrate.")],
    data: options.DataFile,
    output: options.OutputFile = Path("calibrated.safetensors"),
    budget: Annotated[
        float,
        typer.Option(
            help="Most damage to plain text: perplexity over the unsteered one, or KL divergence "
            "a token in nats."
        ),
    ] = 1.1,
    damage: Annotated[
        DamageName, typer.Option(help="What the budget is of.")
    ] = DamageName.perplexity,
    max_strength: Annotated[float, typer.Option(help="Largest strength tried.")] = 0.5,
    n_trials: Annotated[int, typer.Option(min=1, help="How many strengths are tried.")] = 16,
    positions: options.SteeredPositions = options.Positions.all,
    text: options.DamageTextFile = None,
    n_plain: Annotated[int, typer.Option(min=1, help="Plain texts for the damage.")] = 100,
    kind: options.Kind = options.KindName.auto,
    columns: options.ColumnOption = None,
    roles: options.RoleOption = None,
    positive: options.PositiveLabel = None,
    negative: options.NegativeLabel = None,
    limit: options.Limit = None,
    chat_template: options.ChatTemplate = False,
    plot: options.RowsPlotFile = None,
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
    """Choose a pack's strength and layers by the validation split, within a damage budget.

    Example: expertsteer calibrate -t gemma-3-270m -p happy.safetensors -d sentiment.jsonl
    --budget 1.2 -o happy-calibrated --plot trade-off.png

    The test split is never read. Where nothing beats the unsteered model, it says so and writes
    strength 0.
    """
    from expertsteer.calibration import calibrate as calibrate_pack
    from expertsteer.data import load_plain_text, split_sentences
    from expertsteer.models import load_model
    from expertsteer.pack import SteeringPack

    # The pack itself may get its strength in place; nothing of it is lost.
    refuse_overwriting(context, saved_with_config(output)[1])
    known = SteeringPack.load(pack)
    examples = options.load_data(
        data,
        kind=kind,
        columns=columns,
        roles=roles,
        positive=positive,
        negative=negative,
        limit=limit,
        seed=seed,
    )
    # The other half is what `evaluate` reports damage on.
    plain, _ = split_sentences(load_plain_text(text), n_plain)
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    result = calibrate_pack(
        load_model(loading.source(target, target_revision)),
        known,
        examples,
        plain,
        budget=budget,
        damage=damage.value,
        max_strength=max_strength,
        n_trials=n_trials,
        positions=positions.value,
        chat_template=chat_template,
        seed=seed,
        force=force,
    )
    path = result.pack.save(output)
    write_config(context, path)
    if plot:
        from expertsteer.plots import plot_calibration

        plot_calibration(result, plot)
    if as_json:
        print_json(result.to_dict() | {"path": str(path)})
        return
    answer.print(calibration_table(result))
    if result.chosen is None:
        say("nothing within the budget beats the unsteered model; the pack has strength 0")
    say(f"pack: {path}")
