"""expertsteer demo."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.show import answer, comparison_table, generation_table, pairs_table, say

__all__ = ["demo"]


def demo(
    output: options.OutputFolder = Path("demo-output"),
    target: options.TargetModel = "gemma-3-270m",
    expert: options.ExpertModel = "smollm2-135m-instruct",
    strength: Annotated[
        float | None,
        typer.Option(
            help="For each layer, relative to the mean residual norm. Default: the pack's own."
        ),
    ] = None,
    dtype: options.Dtype = options.DtypeName.auto,
    cache_dir: options.CacheDir = None,
    no_cache: options.NoCache = False,
    seed: options.Seed = 0,
) -> None:
    """Run the whole method on two small real models and compare it honestly.

    Makes a pack that steers Gemma-3-270M towards positive feelings with a vector of
    SmolLM2-135M-Instruct, shows generations side by side, and prints what random vectors, shuffled
    labels, the target's own vectors and the paper's alignment do in its place.
    """
    from expertsteer.comparison import compare
    from expertsteer.data import (
        EffectWords,
        load_examples,
        load_plain_text,
        sentence_beginnings,
        shipped_file,
    )
    from expertsteer.files import write_text
    from expertsteer.generation import generate_side_by_side
    from expertsteer.models import ModelSource, load_model
    from expertsteer.pipeline import ExpertSteer
    from expertsteer.plots import plot_comparison, plot_information

    begun = time.monotonic()
    examples = load_examples(shipped_file("sentiment.jsonl"))
    words = EffectWords.load(shipped_file("sentiment_effect.json"))
    plain_text = sentence_beginnings(load_plain_text(), 1500, seed=seed)
    folder = options.cache_folder(cache_dir, no_cache)

    say(f"loading the target {target} and the expert {expert} (the first time converts them)")
    target_model = load_model(ModelSource(target, dtype=dtype.value))
    expert_model = load_model(ModelSource(expert, dtype=dtype.value))

    say(f"fitting on {examples.describe_splits()} texts of feelings: states, pairs, vectors")
    steer = ExpertSteer(strength=strength)
    alignment = steer.align(target_model, expert_model, examples.for_fitting(), cache_dir=folder)
    pack = steer.fit(target_model, expert_model, examples, alignment=alignment, cache_dir=folder)
    path = pack.save(output / "pack.safetensors")
    picture = plot_information(
        alignment.mutual_information,
        pack.pairs,
        output / "mutual_information.png",
        expert=Path(expert).name,
        target=Path(target).name,
        candidates=alignment.pairs,
    )
    answer.print(pairs_table(pack.pairs, pack.mean_residual_norms))

    say("generating, unsteered and steered")
    generations = generate_side_by_side(
        target_model,
        [pack],
        words.generation_prompts,
        [pack.strength, -pack.strength],
        max_new_tokens=24,
        repetition_penalty=1.2,
    )
    answer.print(generation_table(generations))

    say("comparing with what it has to beat (this takes the longest)")
    comparison = compare(
        target_model,
        expert_model,
        examples,
        words,
        pack=pack,
        steer=steer,
        plain_text=plain_text,
        seeds=(seed, seed + 1),
        cache_dir=folder,
    )
    answer.print(comparison_table(comparison))
    write_text(output / "comparison.json", json.dumps(comparison.to_dict(), indent=2))
    chart = plot_comparison(comparison, output / "comparison.png")
    say(f"pack: {path}; pictures: {picture} and {chart}; rows: {output / 'comparison.json'}")
    say(f"done in {time.monotonic() - begun:.0f} s")
