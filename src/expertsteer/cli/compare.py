"""expertsteer compare."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import method, options
from expertsteer.cli.config import config_path, refuse_overwriting, write_config
from expertsteer.cli.show import answer, comparison_table, print_json, say

__all__ = ["compare"]


class MethodName(str, Enum):
    """Ways to get vectors."""

    random = "random"
    shuffled = "shuffled"
    mean_difference = "mean_difference"
    pca = "pca"
    probe = "probe"
    rfm = "rfm"
    expertsteer_paper = "expertsteer_paper"
    expertsteer = "expertsteer"
    transferred = "transferred"


def compare(
    context: typer.Context,
    target: options.TargetModel,
    expert: options.ExpertModel,
    data: options.DataFile,
    words: Annotated[
        Path,
        typer.Option(
            "--words",
            "-w",
            help="JSON or YAML with the lists prompts, positive_words, negative_words, "
            "plain_sentences and generation_prompts.",
            rich_help_panel="Data",
        ),
    ],
    pack: Annotated[
        Path | None,
        typer.Option("--pack", "-p", help="A pack fitted before; default: fit one now."),
    ] = None,
    methods: Annotated[
        list[MethodName] | None,
        typer.Option("--method", "-m", help="Rows of the table. Repeatable; default: most."),
    ] = None,
    output: options.OptionalOutputFile = None,
    text: options.TextFile = None,
    n_beginnings: options.NumberOfBeginnings = 1500,
    kind: options.Kind = options.KindName.auto,
    columns: options.ColumnOption = None,
    roles: options.RoleOption = None,
    positive: options.PositiveLabel = None,
    negative: options.NegativeLabel = None,
    limit: options.Limit = None,
    chat_template: options.ChatTemplate = False,
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
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    target_revision: options.TargetRevision = None,
    expert_revision: options.ExpertRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    cache_dir: options.CacheDir = None,
    no_cache: options.NoCache = False,
    plot: options.RowsPlotFile = None,
    force: options.Force = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> None:
    """Compare a pack with every baseline it has to beat: cosine, effect, perplexity.

    Example: expertsteer compare -t gemma-3-270m -e smollm2-135m-instruct -d emotions.jsonl
    --column label=emotion --positive happiness --negative sadness -w words.yaml

    All rows steer the same layers with vectors of equal length: a random one, one from shuffled
    labels, the target's own mean difference and RFM, the paper's auto-encoder in two seeds, the
    aligned encoder, and a vector carried over on plain text alone.
    """
    import json

    from expertsteer.comparison import compare as compare_methods
    from expertsteer.data import EffectWords
    from expertsteer.files import write_text
    from expertsteer.models import load_model
    from expertsteer.pack import SteeringPack
    from expertsteer.steering import check_strength

    if output:
        refuse_overwriting(context, output, config_path(output))
    effect_words = EffectWords.load(words)
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
        paper=False,
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
        keep_encoders=False,
        seed=seed,
    )
    if strength is not None:
        check_strength(strength)
    known = SteeringPack.load(pack) if pack else None
    if known:
        known.resolve_strength(strength)
    plain_text = options.beginnings(text, n_beginnings, seed)
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    target_model = load_model(loading.source(target, target_revision))
    expert_model = load_model(loading.source(expert, expert_revision))
    folder = options.cache_folder(cache_dir, no_cache)
    if known is None:
        say(f"fitting on {examples.describe_splits()} texts")
        known = steer.fit(target_model, expert_model, examples, cache_dir=folder)
    comparison = compare_methods(
        target_model,
        expert_model,
        examples,
        effect_words,
        pack=known,
        steer=steer,
        plain_text=plain_text,
        methods=[name.value for name in methods] if methods else None,
        strength=strength,
        seeds=(seed, seed + 1),
        force=force,
        cache_dir=folder,
    )
    if output:
        write_text(output, json.dumps(comparison.to_dict(), indent=2))
        write_config(context, output)
    if plot:
        from expertsteer.plots import plot_comparison

        plot_comparison(comparison, plot)
    if as_json:
        print_json(comparison.to_dict())
    else:
        answer.print(comparison_table(comparison))
