"""expertsteer align."""

from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import method, options
from expertsteer.cli.config import refuse_overwriting, saved_with_config, write_config
from expertsteer.cli.show import answer, pairs_table, print_json, say
from expertsteer.processes import is_main_process

__all__ = ["align"]


def align(
    context: typer.Context,
    target: options.TargetModel,
    expert: options.ExpertModel,
    output: options.OutputFile = Path("alignment.safetensors"),
    text: options.TextFile = None,
    n_beginnings: options.NumberOfBeginnings = 1500,
    aligner: method.AlignerChoice = method.AlignerName.ridge,
    aligner_options: method.AlignerOptions = None,
    estimator: method.EstimatorChoice = method.EstimatorName.gaussian,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--pair",
            help="EXPERT:TARGET layers, such as 18:9. Repeatable. Default: every layer of the "
            "deeper model with the other's layer of the same relative depth.",
        ),
    ] = None,
    plot: options.PlotFile = None,
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
    """Align two models on plain text: no labels, once for every vector to come.

    Example: expertsteer align -e smollm2-135m-instruct -t gemma-3-270m --text plain.txt -o a-to-b

    Without --text, a small text that comes with the package is used. Text of the kind that your
    vectors are about aligns best, and a file of rows may hold it (field "text").
    """
    from expertsteer.pipeline import fit_alignment

    refuse_overwriting(context, *saved_with_config(output))
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    texts = options.beginnings(text, n_beginnings, seed)
    say(f"aligning on {len(texts)} sentence beginnings of {text or 'the text that comes along'}")
    alignment = fit_alignment(
        loading.source(target, target_revision),
        loading.source(expert, expert_revision),
        texts,
        aligner=method.build_aligner(aligner, aligner_options, seed),
        pairs=method.parse_pairs(pairs),
        estimator=estimator.value,
        cache_dir=options.cache_folder(cache_dir, no_cache),
    )
    if not is_main_process():
        return
    path = alignment.save(output)
    configuration = write_config(context, path)
    if plot:
        from expertsteer.plots import plot_information

        plot_information(alignment.mutual_information, alignment.pairs, plot)
    if as_json:
        print_json(alignment.summary() | {"path": str(path), "config": str(configuration)})
        return
    answer.print(pairs_table(alignment.pairs, alignment.mean_residual_norms))
    say(f"alignment written to {path}, its configuration to {configuration}")
