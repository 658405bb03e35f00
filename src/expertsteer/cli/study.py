"""expertsteer study."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.show import print_json, say

__all__ = ["require_packages", "study"]


def study(
    file: Annotated[Path, typer.Argument(help="YAML file with the study's settings.")],
    output: options.OutputFolder = Path("study"),
    report_only: Annotated[
        bool,
        typer.Option(
            "--report", help="Only write tables and pictures of what is there; run nothing."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count the cells and estimate the time.")
    ] = False,
    cache_dir: options.CacheDir = None,
    as_json: options.Json = False,
) -> None:
    """Run targets x experts x benchmarks x methods x seeds, and write tables and pictures.

    Example: expertsteer study studies/main.yaml -o studies/results/main

    A cell is a method on a benchmark: fitted on the train split, as strong as the damage budget
    allows, measured on the test split. The same command continues an interrupted study; nothing
    is measured twice. Experts and targets are measured unsteered first, and cells whose expert is
    not better than the target are marked, since nothing can be transferred there.
    """
    from expertsteer.models.cache import cache_root
    from expertsteer.study import load_study, run_study

    settings = load_study(file)
    require_packages(any(arm.method == "lora" for arm in settings.methods))
    from expertsteer.study.report import write_report

    def plan(n_cells: int, n_left: int, seconds: float) -> None:
        say(f"{n_cells} cells, {n_left} to do: about {seconds / 3600:.1f} hours on this machine")

    if not report_only:
        run_study(
            settings,
            output,
            cache_dir=cache_dir or cache_root() / "states",
            on_plan=plan,
            dry_run=dry_run,
        )
        if dry_run:
            return
    written = write_report(output, settings)
    if as_json:
        print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            say(str(path))


def require_packages(fine_tunes: bool = False) -> None:
    """Raise before hours of work where packages that studies need are missing."""
    from expertsteer.errors import ExpertSteerError

    needed = {"pandas": "study", "tabulate": "study", "jinja2": "study"}
    for name, extra in (needed | ({"peft": "lora"} if fine_tunes else {})).items():
        if importlib.util.find_spec(name) is None:
            raise ExpertSteerError(
                f"Got no package {name}, but this study needs it. Install it with: "
                f'pip install "expertsteer[{extra}]"'
            )
