"""Steer only the prompts that the expert's own score asks for.

Reads a finished study and measures nothing anew in the target: an item that is not steered has
the value it has without steering. Of every cell of the chosen method, the expert reads the
prompts of the test items; those that its direction finder, fitted on the cell's train rows,
scores below half-way between its two classes are steered. What that gives is compared with
steering as many items chosen at random, which gives their share of the whole effect. Run with:
python studies/input_dependent_strength.py STUDY_FOLDER --output found.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertsteer.cli.options import CacheDir

if TYPE_CHECKING:
    import numpy as np
    import torch

    from expertsteer.models import LanguageModel
    from expertsteer.study.settings import ArmSettings, ModelSettings, StudySettings
    from expertsteer.study.subjects import Benchmark


def scores_of_prompts(
    expert: LanguageModel,
    settings: ModelSettings,
    benchmark: Benchmark,
    arm: ArmSettings,
    layer: int,
    cache_dir: Path,
) -> np.ndarray:
    """Return the expert's scores of the test prompts, 0 half-way between its classes.

    Parameters
    ----------
    expert : LanguageModel
    settings : ModelSettings
        Of the expert, which its states are found by.
    benchmark : Benchmark
    arm : ArmSettings
        Its direction finder makes the scores.
    layer : int
        Of the expert.
    cache_dir : Path
        Where collected states are kept, and those of the study found.

    Returns
    -------
    array of shape (n_items,)
    """
    from expertsteer.pipeline import fit_directions
    from expertsteer.study.subjects import Subject, collect_corpus

    def states_of(corpus: Any, position: str) -> torch.Tensor:
        found = collect_corpus(expert, settings, corpus, position, cache_dir, progress=False)
        return found.layer(layer)[:, None]

    examples = benchmark.fitting
    states = states_of(examples, arm.position)
    [(finder, _)] = fit_directions(arm.steer(benchmark.seed).direction, states, examples)
    train = [row for row, split in enumerate(examples.splits) if split == "train"]
    known = _as_float64(finder.predict(states[train, 0]))
    labels = examples.labels[train]
    half_way = (known[labels > 0].mean() + known[labels < 0].mean()) / 2
    prompts = [item.prompt for item in Subject(expert, benchmark).test[0].questions]
    asked = states_of(prompts, "last")[:, 0]
    return _as_float64(finder.predict(asked)) - half_way


def _as_float64(values: Any) -> np.ndarray:
    import torch

    return torch.as_tensor(values).double().cpu().numpy()


def chosen_effect(change: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Return what steering by scores gives, beside steering all items.

    Parameters
    ----------
    change : array of shape (n_items,)
        Steered minus unsteered.
    scores : array of shape (n_items,)
        Items below 0 are steered.

    Returns
    -------
    dict
        ``share`` steered, ``everywhere`` and ``chosen`` (mean change of all items), ``gain`` of
        choosing by score over choosing as many at random, with its interval, and ``spearman``
        between score and change.
    """
    import numpy as np
    from scipy.stats import spearmanr

    from expertsteer.evaluation.intervals import mean_interval

    steered = scores < 0
    gain = change * (steered - steered.mean())
    varied = len(set(scores.tolist())) > 1 and len(set(change.tolist())) > 1
    rank = spearmanr(scores, change).statistic if varied else np.nan
    return {
        "n_items": len(change),
        "share": round(float(steered.mean()), 4),
        "everywhere": round(float(change.mean()), 5),
        "chosen": round(float((change * steered).mean()), 5),
        "gain": round(float(gain.mean()), 5),
        "gain_interval": [round(value, 5) for value in mean_interval(gain)],
        "spearman": None if np.isnan(rank) else round(float(rank), 4),
    }


def measure(
    study: StudySettings,
    cells: list[dict[str, Any]],
    method: str,
    experts: list[str],
    cache_dir: Path,
) -> list[dict[str, Any]]:
    """Return what choosing by score gives in every cell of a method, an expert at a time."""
    import numpy as np
    from tqdm.auto import tqdm

    from expertsteer.models import load_model
    from expertsteer.study.subjects import load_benchmark

    [arm] = [arm for arm in study.methods if arm.name == method]
    benchmarks = {settings.name: settings for settings in study.benchmarks}
    unsteered = {
        (cell["target"], cell["benchmark"], cell["seed"]): cell
        for cell in cells
        if cell["method"] == "none"
    }
    found = []
    for settings in study.experts:
        wanted = [
            cell
            for cell in cells
            # Labelled texts have no prompt that an expert could read before they are written.
            if (cell["method"], cell["expert"]) == (method, settings.name)
            and "log_odds" in cell["test"]
        ]
        if not wanted or settings.name not in experts:
            continue
        expert = load_model(settings.source)
        scores: dict[tuple[Any, ...], np.ndarray] = {}
        for cell in tqdm(wanted, desc=settings.name, unit="cell"):
            key = (cell["benchmark"], cell["seed"], cell["pairs"][0][0])
            if key not in scores:
                drawn = load_benchmark(study, benchmarks[cell["benchmark"]], cell["seed"])
                scores[key] = scores_of_prompts(
                    expert, settings, drawn, arm, cell["pairs"][0][0], cache_dir
                )
            # Of a question, its log-odds: whether it is answered rightly is too coarse.
            before = unsteered[cell["target"], cell["benchmark"], cell["seed"]]["test"]["log_odds"]
            change = np.subtract(cell["test"]["log_odds"], before)
            names = ("target", "expert", "benchmark", "seed", "pairs", "strength")
            found.append({n: cell[n] for n in names} | chosen_effect(change, scores[key]))
    return found


def choose_by_score(
    folder: Annotated[Path, typer.Argument(help="What `expertsteer study` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A JSON file.")],
    method: Annotated[str, typer.Option(help="The arm whose steering is chosen.")] = "expertsteer",
    expert: Annotated[list[str] | None, typer.Option(help="Only this expert; repeatable.")] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Compare steering where the expert asks for it with steering everywhere."""
    from rich.table import Table

    from expertsteer.cli.show import answer, say
    from expertsteer.cli.study import require_packages
    from expertsteer.errors import ParameterError
    from expertsteer.files import write_text
    from expertsteer.models.cache import cache_root
    from expertsteer.provenance import describe_machine, package_versions

    require_packages()
    from expertsteer.study.report import load_cells

    study, cells, _ = load_cells(folder)
    known = [arm.name for arm in study.methods if arm.needs_expert]
    if method not in known:
        raise ParameterError(
            f"Got --method {method!r}, but expected a method of an expert that the study has: "
            f"{', '.join(known)}."
        )
    experts = [settings.name for settings in study.experts]
    for name in expert or []:
        if name not in experts:
            raise ParameterError(
                f"Got --expert {name!r}, but expected one of the study's: {', '.join(experts)}."
            )
    rows = measure(study, cells, method, expert or experts, cache_dir or cache_root() / "states")
    if not rows:
        raise ParameterError(
            f"Got no finished cell of {method} on prompts in {folder}, but expected some. Run the "
            "study first."
        )
    about = {"study": study.name, "method": method, "rows": rows}
    about |= {"versions": package_versions(), "machine": describe_machine()}
    write_text(output, json.dumps(about, indent=1) + "\n")
    table = Table("target", "expert", "benchmark", "steered", "everywhere", "chosen", "gain")
    for row in rows:
        low, high = row["gain_interval"]
        table.add_row(
            *(row["target"], row["expert"], row["benchmark"], f"{row['share']:.0%}"),
            *(f"{row['everywhere']:+.3f}", f"{row['chosen']:+.3f}"),
            f"{row['gain']:+.3f} ({low:+.3f} to {high:+.3f})",
        )
    answer.print(table)
    say(f"written: {output}")


def main() -> None:
    """Run the command; a user's mistake is one line."""
    from expertsteer.cli.running import run_script

    run_script(choose_by_score)


if __name__ == "__main__":
    main()
