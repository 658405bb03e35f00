"""Run a study: every cell once, whatever interrupts it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from expertsteer.calibration import damage_meter
from expertsteer.errors import DataError, ExpertSteerError
from expertsteer.evaluation.row_file import RowFile, read_json_lines
from expertsteer.files import write_text
from expertsteer.locks import try_lock
from expertsteer.models import LanguageModel, load_model
from expertsteer.models.cache import require_disk
from expertsteer.provenance import describe_machine, package_versions
from expertsteer.study.cell import Cell, cells_of, models_of
from expertsteer.study.estimate import estimate_seconds, n_tokens
from expertsteer.study.measuring import TargetBench, measure_unsteered
from expertsteer.study.settings import ArmSettings, ModelSettings, StudySettings
from expertsteer.study.subjects import Benchmark, Subject, collect_corpus

__all__ = ["run_study"]


def run_study(
    study: StudySettings,
    output: str | Path,
    *,
    cache_dir: Path,
    on_plan: Callable[[int, int, float], None] | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run the cells of a study that are not there yet.

    Parameters
    ----------
    study : StudySettings
    output : str or Path
        A folder: ``cells.jsonl`` (a row a cell), ``layers.jsonl`` (the target layers a
        benchmark's cells share), ``study.json`` (settings, machines and versions),
        ``adapters`` (fine-tuned ones). The same folder is continued; a cell
        whose settings have changed is measured again, and the old row stays unread.
    cache_dir : Path
        Where collected states are kept and found again.
    on_plan : callable, optional
        Called before anything is run with the number of cells, of those still to do, and
        the seconds they will take about.
    dry_run : bool, default=False
        Stop there.
    progress : bool, default=True
        Show a bar over the cells, with an estimate of the time left.

    Returns
    -------
    list of dict
        The rows of all cells.

    Raises
    ------
    ExpertSteerError
        If another process is running in the folder, a folder cannot be written, or a model or
        data set is unusable.
    """
    folder = Path(output)
    # First, so that unusable data leave no folder behind.
    cells = cells_of(study)
    wanted = {cell.fingerprint(study): cell for cell in cells}

    def plan(rows: Sequence[dict[str, Any]]) -> list[Cell]:
        done = {row["fingerprint"] for row in rows if "error" not in row}
        left = [cell for fingerprint, cell in wanted.items() if fingerprint not in done]
        if on_plan is not None:
            on_plan(len(cells), len(left), estimate_seconds(study, left, rows))
        return left

    def of_study(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        # A cell that failed before and was had later counts as it is now.
        newest = {row["fingerprint"]: row for row in rows}
        return [row for fingerprint, row in newest.items() if fingerprint in wanted]

    if dry_run:
        known = folder / "cells.jsonl"
        rows = read_json_lines(known) if known.exists() else []
        plan(rows)
        return of_study(rows)
    require_disk(cache_dir, 0, "states")
    require_disk(folder, 0, "the study")
    lock = try_lock(folder)
    if lock is None:
        raise ExpertSteerError(
            f"Got the folder {folder}, which another study is running in. Wait for it or name "
            "another folder."
        )
    try:
        with RowFile(folder / "cells.jsonl") as rows, RowFile(folder / "layers.jsonl") as choices:
            left = plan(rows.rows)
            _Run(study, folder, cache_dir, rows, choices, cells, left, progress).run()
            return of_study(rows.rows)
    finally:
        lock.release()


class _Run:
    """One pass over the cells that are missing."""

    def __init__(
        self,
        study: StudySettings,
        folder: Path,
        cache_dir: Path,
        rows: RowFile,
        choices: RowFile,
        cells: list[Cell],
        left: list[Cell],
        progress: bool,
    ) -> None:
        self.study = study
        self.folder = folder
        self.cache_dir = cache_dir
        self.rows = rows
        self.choices = choices
        self.cells = cells
        self.left = left
        self.progress = progress

    def run(self) -> None:
        self._describe()
        if not self.left:
            return
        self.plain = self.cells[0].plain
        # Tokens, since cells differ too much in size for an estimate of the time left.
        shown = {"desc": "study", "unit": "tok", "unit_scale": True, "disable": not self.progress}
        total = sum(n_tokens(self.study, cell) for cell in self.left)
        with tqdm(total=total, **shown) as self.bar:
            # All experts first: the target of one pair may be the expert of another.
            for settings in self.study.experts:
                lent = [cell for cell in self.left if cell.expert == settings != cell.target]
                if lent:
                    self._lend(settings, load_model(settings.source), lent)
            for settings in models_of(self.study):
                own = [cell for cell in self.left if cell.target == settings]
                if own:
                    self._steer(settings, load_model(settings.source), own)

    def _describe(self) -> None:
        """Write what the cells are, for reports: rows are found by their fingerprints."""
        cells = [
            {"fingerprint": cell.fingerprint(self.study)}
            | cell.identity()
            | {"metric": cell.benchmark.metric, "constant": cell.benchmark.constant}
            for cell in self.cells
        ]
        path = self.folder / "study.json"
        ran_on = _ran_on(path)
        here = {"machine": describe_machine(), "versions": package_versions()}
        if self.left and here not in ran_on:
            ran_on.append(here)
        settings = self.study.model_dump(mode="json")
        about = {"settings": settings, "ran_on": ran_on, "cells": cells}
        write_text(path, json.dumps(about, indent=1))

    def _lend(self, settings: ModelSettings, model: LanguageModel, cells: list[Cell]) -> None:
        """Collect the states of an expert that cells of other models will ask for."""
        corpora = {(cell.benchmark, cell.arm.position): cell.benchmark.fitting for cell in cells}
        for (_, position), corpus in corpora.items():
            collect_corpus(model, settings, corpus, position, self.cache_dir, self.progress)
        # In their order, which a set does not keep: an interrupted run goes on with the same.
        for source in dict.fromkeys(c.arm.plain_source for c in cells if c.arm.uses_plain_text):
            plain = self.plain.beginnings[source]
            collect_corpus(model, settings, plain, "last", self.cache_dir, self.progress)

    def _steer(self, settings: ModelSettings, model: LanguageModel, cells: list[Cell]) -> None:
        """Run the cells of a target, a benchmark at a time."""
        by_benchmark: dict[Benchmark, list[Cell]] = {}
        for cell in cells:
            by_benchmark.setdefault(cell.benchmark, []).append(cell)
        meters: list[Any] = []
        if any(cell.arm.method != "none" for cell in cells):
            study = self.study
            meters = [
                damage_meter(model, self.plain.budget, study.damage, study.budget),
                damage_meter(model, self.plain.test, study.damage),
            ]
        for benchmark, wanted in by_benchmark.items():
            subject = Subject(model, benchmark)
            bench = _Once(lambda b=benchmark: self._bench(settings, model, b, meters))
            for cell in wanted:
                if cell.arm.method == "none":
                    self._keep(
                        cell,
                        lambda s=subject: measure_unsteered(s, self.study.undamaged),
                        self.rows,
                    )
                    continue
                self._keep(cell, lambda b=bench, c=cell: self._measured(b.value, c), self.rows)

    def _bench(
        self,
        settings: ModelSettings,
        model: LanguageModel,
        benchmark: Benchmark,
        meters: Sequence[Any],
    ) -> TargetBench:
        return TargetBench(
            self.study, settings, model, benchmark, self.plain, self.cache_dir, *meters
        )

    def _measured(self, bench: TargetBench, cell: Cell) -> dict[str, Any]:
        adapter = self.folder / "adapters" / cell.fingerprint(self.study)
        return bench.run(cell.arm, cell.expert, self._ranked_layers(bench, cell), adapter)

    def _ranked_layers(self, bench: TargetBench, cell: Cell) -> list[int]:
        """Return the target's layers as ranked on what the cell's arm may read of the labels."""
        if not cell.arm.is_vector:
            return []
        # Kept like a cell, so that the choice is made once.
        own = ArmSettings(
            method="mean_difference",
            name="layers",
            n_train=cell.arm.n_train,
            label_noise=cell.arm.label_noise,
        )
        choice = Cell(cell.target, cell.benchmark, own, None, cell.plain)
        found = self._keep(choice, lambda: bench.choose_layers(own), self.choices)
        if "error" in found:
            raise DataError(found["error"])
        return found["layers"]

    def _keep(
        self, cell: Cell, measure: Callable[[], dict[str, Any]], file: RowFile
    ) -> dict[str, Any]:
        """Measure a cell unless it is there, and write it down at once."""
        fingerprint = cell.fingerprint(self.study)
        for row in file.rows:
            if row["fingerprint"] == fingerprint and "error" not in row:
                return row
        started = time.perf_counter()
        self.bar.set_postfix_str(
            f"{cell.target.name} {cell.benchmark.settings.name} {cell.arm.name}"
        )
        try:
            measured = measure()
        except ExpertSteerError as error:
            # One arm that cannot be had does not cost the others; the report lists it, and
            # the next run tries it again.
            measured = {"error": str(error)}
        size = n_tokens(self.study, cell)
        cost = {"total_seconds": round(time.perf_counter() - started, 2), "n_tokens": size}
        row = {"fingerprint": fingerprint} | cell.identity() | measured | cost
        file.add([row])
        self.bar.update(size if cell in self.left else 0)
        return row


class _Once:
    """A value that is made when it is first wanted; a failure is tried again."""

    def __init__(self, make: Callable[[], TargetBench]) -> None:
        self.make = make

    @cached_property
    def value(self) -> TargetBench:
        return self.make()


def _ran_on(path: Path) -> list[dict[str, Any]]:
    """Return what earlier runs of the folder ran on; what is no record of a study tells nothing."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["ran_on"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
