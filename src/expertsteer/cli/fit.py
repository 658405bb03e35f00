"""expertsteer fit."""

from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import method, options
from expertsteer.cli.config import (
    refuse_overwriting,
    saved_with_config,
    set_options,
    write_config,
)
from expertsteer.cli.show import answer, pairs_table, print_json, say
from expertsteer.errors import ParameterError
from expertsteer.processes import is_main_process

__all__ = ["fit"]


def fit(
    context: typer.Context,
    data: options.DataFile,
    output: options.OutputFile = Path("pack.safetensors"),
    target: options.OptionalTarget = None,
    expert: options.OptionalExpert = None,
    target_states: Annotated[
        Path | None,
        typer.Option(
            help="Saved states in place of --target (from collect).", rich_help_panel="Models"
        ),
    ] = None,
    expert_states: Annotated[
        Path | None,
        typer.Option(
            help="Saved states in place of --expert (from collect).", rich_help_panel="Models"
        ),
    ] = None,
    alignment: Annotated[
        Path | None,
        typer.Option(
            help="An alignment fitted before (from align); the target then reads no labelled text, "
            "except that --strategy validated tries the layers on the validation texts.",
            rich_help_panel="Data",
        ),
    ] = None,
    text: options.TextFile = None,
    n_beginnings: options.NumberOfBeginnings = 1500,
    kind: options.Kind = options.KindName.auto,
    columns: options.ColumnOption = None,
    roles: options.RoleOption = None,
    positive: options.PositiveLabel = None,
    negative: options.NegativeLabel = None,
    limit: options.Limit = None,
    chat_template: options.ChatTemplate = False,
    paper: method.Paper = False,
    aligner: method.AlignerChoice = method.AlignerName.aligned,
    aligner_options: method.AlignerOptions = None,
    estimator: method.EstimatorChoice = method.EstimatorName.gaussian,
    strategy: method.Strategy = method.StrategyName.validated,
    n_pairs: method.NumberOfPairs = 1,
    pairs: method.LayerPairs = None,
    direction: method.DirectionChoice = method.DirectionName.rfm,
    direction_options: method.DirectionOptions = None,
    bandwidths: method.Bandwidths = None,
    position: method.TokenPosition = method.PositionName.last,
    strength: method.Strength = None,
    keep_encoders: Annotated[
        bool, typer.Option("--keep-encoders", help="Store the encoders in the pack.")
    ] = False,
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    target_revision: options.TargetRevision = None,
    expert_revision: options.ExpertRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    cache_dir: options.CacheDir = None,
    no_cache: options.NoCache = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> None:
    """Make a steering pack: vectors from the expert, for the target, from labelled texts.

    Example: expertsteer fit -t gemma-3-270m -e smollm2-135m-instruct -d sentiment.jsonl -o happy

    The vectors come from the train split and the choices from the validation split; the test
    split is never read. Files without splits are split 60/20/20.
    """
    from expertsteer.alignment import Alignment

    refuse_overwriting(context, *saved_with_config(output))
    if alignment:
        fitted_with = ("paper", "aligner", "aligner_options", "estimator", "text")
        for option in set_options(context, fitted_with):
            raise ParameterError(
                f"Got {option} with --alignment, which is fitted already, but expected one of "
                "them. Leave one out."
            )
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
    steer = method.build_method(
        paper=paper,
        aligner=aligner,
        aligner_options=aligner_options,
        estimator=estimator,
        strategy=strategy,
        n_pairs=n_pairs,
        pairs=pairs,
        direction=direction,
        direction_options=direction_options,
        bandwidths=bandwidths,
        strength=strength,
        position=position,
        chat_template=chat_template,
        keep_encoders=keep_encoders,
        seed=seed,
    )
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    known_alignment = Alignment.load(alignment) if alignment else None
    left_out = f"; {examples.n_left_out} rows of other labels left out"
    say(
        f"{len(examples)} labelled texts from {data}: {examples.describe_splits()}"
        f"{left_out if examples.n_left_out else ''}"
    )
    pack = steer.fit(
        loading.model_or_states("target", target, target_revision, target_states, known_alignment),
        loading.model_or_states("expert", expert, expert_revision, expert_states),
        examples,
        alignment=known_alignment,
        alignment_text=options.beginnings(text, n_beginnings, seed) if text else None,
        cache_dir=options.cache_folder(cache_dir, no_cache),
    )
    if not is_main_process():
        return
    path = pack.save(output)
    configuration = write_config(context, path)
    if as_json:
        print_json(pack.summary() | {"path": str(path), "config": str(configuration)})
        return
    answer.print(pairs_table(pack.pairs, pack.mean_residual_norms))
    say(f"pack written to {path}, its configuration to {configuration}")
    say(f'try it: expertsteer generate -t {pack.target.name} -p {path} "I went to the market and"')
