"""A study's figures from its cells: changes with paired intervals, averages, tables."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from expertsteer.errors import DataError
from expertsteer.evaluation.row_file import read_json_lines
from expertsteer.files import write_text
from expertsteer.provenance import machine_line
from expertsteer.study.figures import Frame, draw_figures, labels_of
from expertsteer.study.frames import CELL_KEYS, SHARES, average_frame, cell_frame
from expertsteer.study.settings import StudySettings

__all__ = [
    "MEASURES",
    "average_tables",
    "domain_frames",
    "load_cells",
    "notes",
    "write_report",
]

_NOT_MEASURED = "not measured yet"


def load_cells(folder: str | Path) -> tuple[StudySettings, list[dict[str, Any]], dict[str, Any]]:
    """Read what `run_study` wrote.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    study : StudySettings
    cells : list of dict
        The study's finished cells, as its settings name them now.
    about : dict
        ``ran_on``: the ``machine`` and ``versions`` of every run that measured something,
        and ``missing``: the cells that are not there, and why.

    Raises
    ------
    DataError
        If the folder holds no study.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Got {folder}, but expected a folder that a study has written.") from error
    try:
        study = StudySettings.model_validate(about.pop("settings"))
        listed = [dict(cell) for cell in about.pop("cells")]
    except (ValidationError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"Got {folder / 'study.json'}, but expected what this release writes. Run the study "
            "again; finished cells are found by what they measure."
        ) from error
    rows = {row["fingerprint"]: row for row in read_json_lines(folder / "cells.jsonl")}
    cells, missing = [], []
    for named in listed:
        row = rows.get(named["fingerprint"], {})
        if "test" in row:
            cells.append(row | named)
        else:
            reason = row.get("error", _NOT_MEASURED)
            missing.append({key: named[key] for key in CELL_KEYS} | {"error": reason})
    return study, cells, about | {"missing": missing}


# What the columns of all studies' tables are.
MEASURES = (
    "Shares of right answers in per cent; preference in nats a token. `*`: the unsteered expert "
    "answers no more questions rightly than the target, so there is nothing to transfer. Judged: "
    "the judge's score of what is written after the test prompts; repeated: the share of its "
    "4-grams of words that occurred in it before. Intervals: 95 % paired bootstrap over items, of "
    'which those that several benchmarks share are drawn for all of them at once; "items" counts '
    "distinct ones. Averages are over the benchmarks that all methods of the target have. Against "
    "the best own vector: the method of own vectors that the validation split names, on the same "
    "items. Where the expert is better: the change over those benchmarks only. Deployed: cells "
    "without a clear gain on the validation split stay unsteered. Damage: on plain text, over "
    "unsteered. Fit: seconds of work. s / 1,000 tokens: of the test questions. Time: of the same, "
    "over unsteered."
)


def write_report(folder: str | Path, expected: StudySettings | None = None) -> list[Path]:
    """Write a study's tables and pictures from its cells.

    Parameters
    ----------
    folder : str or Path
        Where `run_study` wrote.
    expected : StudySettings, optional
        A warning says where the folder was written with others.

    Returns
    -------
    list of Path
        ``report.md``, ``report.tex``, ``report.json`` and the pictures.

    Raises
    ------
    DataError
        If there is no benchmark that all methods of a target have finished.
    """
    folder = Path(folder)
    study, cells, about = load_cells(folder)
    if expected is not None and expected != study:
        fields = [n for n in type(study).model_fields if getattr(expected, n) != getattr(study, n)]
        warnings.warn(
            f"Got {folder}, which was written by a study with other settings "
            f"({', '.join(fields)}); the report shows that one.",
            stacklevel=2,
        )
    frame = cell_frame(study, cells)
    averages = average_frame(study, cells, frame)
    if averages.empty:
        failed = [row["error"] for row in about["missing"] if row["error"] != _NOT_MEASURED]
        reason = f" A cell could not be had: {failed[0]}" if failed else ""
        raise DataError(
            f"Got {folder}, but expected a study with a benchmark that all methods of a target "
            f"have finished. Run it on.{reason}"
        )
    by_domain = domain_frames(study, cells, frame)
    values = {
        "averages": json.loads(averages.to_json(orient="records", double_precision=5)),
        "averages by domain": {
            domain: json.loads(found.to_json(orient="records", double_precision=5))
            for domain, found in by_domain.items()
        },
        "cells": json.loads(frame.to_json(orient="records", double_precision=5)),
        "settings": study.model_dump(mode="json"),
    } | about
    written = [folder / "report.json", folder / "report.md", folder / "report.tex"]
    write_text(written[0], json.dumps(values, indent=1))
    write_text(written[1], _markdown(study, cells, frame, averages, by_domain, about))
    write_text(written[2], _latex(study, frame, averages))
    return written + draw_figures(study, frame, averages, folder)


def _markdown(
    study: StudySettings,
    cells: Sequence[dict[str, Any]],
    frame: Frame,
    averages: Frame,
    by_domain: dict[str, Frame],
    about: dict[str, Any],
) -> str:
    lines = [f"# {study.name}", ""]
    lines += [
        "## Models as they are",
        "",
        _unsteered_table(study, frame).to_markdown(missingval=""),
        "",
    ]
    for target in averages["target"].unique():
        lines += [
            f"## {target}",
            "",
            _target_table(study, frame, target).to_markdown(missingval=""),
            "",
        ]
        for table in average_tables(study, averages, by_domain, target):
            lines += [table, ""]
    lines += [MEASURES, "", *notes(study, cells, about)]
    return "\n".join(lines) + "\n"


def _latex(study: StudySettings, frame: Frame, averages: Frame) -> str:
    parts = []
    for target in averages["target"].unique():
        table = _target_table(study, frame, target)
        parts.append(table.to_latex(caption=f"{study.name}: {target}", escape=True))
    return "\n".join(parts)


def _unsteered_table(study: StudySettings, frame: Frame) -> Frame:
    plain = frame[frame["method"] == "none"]
    shares = set(plain.loc[plain["metric"].isin(SHARES), "benchmark"])
    table = plain.pivot_table(index="target", columns="benchmark", values="mean", sort=False)
    columns = {
        b.name: [
            _shown(100 * value, 1) if b.name in shares else _shown(value, 3)
            for value in table[b.name]
        ]
        for b in study.benchmarks
        if b.name in table
    }
    return pd.DataFrame(columns, index=table.index.rename("model"))


def _target_table(study: StudySettings, frame: Frame, target: str) -> Frame:
    """Return methods by benchmarks, with averages by domain and over all."""
    own = frame[frame["target"] == target].copy()
    own["shown"] = np.where(own["metric"].isin(SHARES), 100 * own["mean"], own["mean"])
    own["label"] = labels_of(own)
    means = own.groupby(["label", "benchmark"], sort=False)["shown"].mean().unstack("benchmark")
    shares = set(own.loc[own["metric"].isin(SHARES), "benchmark"])
    marked = own[own["expert_better"].eq(False)]
    no_transfer = set(zip(marked["label"], marked["benchmark"], strict=True))
    columns: dict[str, Any] = {}
    for domain in dict.fromkeys(b.domain for b in study.benchmarks):
        names = [b.name for b in study.benchmarks if b.domain == domain and b.name in means]
        for name in names:
            columns[name] = [
                _shown(value, 1 if name in shares else 3)
                + ("*" if (label, name) in no_transfer else "")
                for label, value in means[name].items()
            ]
        counted = [name for name in names if name in shares and means[name].notna().all()]
        if len(counted) > 1:
            columns[f"{domain} average"] = [_shown(v, 1) for v in means[counted].mean(axis=1)]
    counted = [name for name in means if name in shares and means[name].notna().all()]
    if counted:
        columns["average"] = [_shown(v, 1) for v in means[counted].mean(axis=1)]
    return pd.DataFrame(columns, index=means.index.rename("method"))


def average_tables(
    study: StudySettings, averages: Frame, by_domain: dict[str, Frame], target: str
) -> list[str]:
    """Return a target's averages, and the changes by domain where there are several, in Markdown.

    Parameters
    ----------
    study : StudySettings
    averages : DataFrame
        See `average_frame`.
    by_domain : dict of str to DataFrame
        See `domain_frames`.
    target : str
    """
    tables = [_average_table(study, averages, target)]
    domains = _domain_table(by_domain, target)
    if domains.shape[1] > 2:  # beside the methods' names
        tables.append(domains)
    return [table.to_markdown(index=False, missingval="") for table in tables]


def _average_table(study: StudySettings, averages: Frame, target: str) -> Frame:
    """Return a target's averages as a table for people."""
    own = averages[averages["target"] == target]
    rows = []
    for label, row in zip(labels_of(own), own.to_dict("records"), strict=True):
        rows.append(
            {
                "method": label,
                "change, points": _interval(row, "change", 1),
                "where the expert is better": _interval(row, "change_transferable", 1),
                "against best own vector": _interval(row, "change_own", 1),
                "deployed": _interval(row, "deployed", 1),
                "effect, nats": _interval(row, "effect", 2),
                "against best own vector, nats": _interval(row, "effect_own", 2),
                f"against {study.reference}, nats": _interval(row, "effect_reference", 2),
                "judged": _interval(row, "judged", 2),
                "repeated": _interval(row, "repeated", 2),
                "items": row["n_items"],
                "won / lost": f"{row['wins']} / {row['losses']} of {row['n_benchmarks']}",
                "damage": _shown(row["damage"], 3),
                "fit, s": _shown(row["fit_seconds"], 1),
                "s / 1,000 tokens": _shown(row["seconds_per_1000_tokens"], 2),
                "time, x": _shown(row["slowdown"], 2),
            }
        )
    table = pd.DataFrame(rows)
    # Where no benchmark counts right answers, there are no points.
    return table.loc[:, (table != "").any()]


def domain_frames(
    study: StudySettings, cells: Sequence[dict[str, Any]], frame: Frame
) -> dict[str, Frame]:
    """Return the averages over the benchmarks of each domain, see `average_frame`."""
    return {
        domain: average_frame(study, cells, frame[frame["domain"] == domain])
        for domain in dict.fromkeys(benchmark.domain for benchmark in study.benchmarks)
    }


def _domain_table(by_domain: dict[str, Frame], target: str) -> Frame:
    """Return the change of right answers by domain, a row a method, as a table for people."""
    columns = {}
    for domain, averages in by_domain.items():
        own = averages[averages["target"] == target] if len(averages) else averages
        shown = [_interval(row, "change", 1) for row in own.to_dict("records")]
        if any(shown):
            columns[f"{domain}, points"] = pd.Series(shown, index=labels_of(own))
    return pd.DataFrame(columns).rename_axis("method").reset_index()


def _interval(row: dict[str, Any], name: str, digits: int) -> str:
    if row[name] is None or row[name] != row[name]:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def notes(
    study: StudySettings, cells: Sequence[dict[str, Any]], about: dict[str, Any]
) -> Iterable[str]:
    """Yield what a reader of one study's tables has to know: gaps, sizes, machine, versions."""
    machines = [machine_line(**ran) for ran in about["ran_on"]]
    yield from _gaps(cells, about["missing"])
    constant: dict[str, float] = {}
    for cell in cells:
        if cell.get("constant"):
            name = cell["benchmark"]
            constant[name] = max(cell["constant"], constant.get(name, 0))
    if constant:
        listed = ", ".join(f"{100 * share:.1f} % of {name}" for name, share in constant.items())
        yield f"The same answer to every test question would be right in {listed}."
        yield ""
    yield (
        f"{_sizes(study, cells)}; seeds {', '.join(map(str, study.seeds))}. Every vector is as "
        f"strong as a {study.damage} budget of {study.budget:g} on other plain text allows. "
        f"Machine: {'. Continued on: '.join(machines)}."
    )


def _gaps(cells: Sequence[dict[str, Any]], missing: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield paragraphs of what is not there, and of what was not read or written whole."""
    for cell in missing:
        if cell["error"] != _NOT_MEASURED:
            name = ", ".join(str(cell[key]) for key in CELL_KEYS if cell[key] is not None)
            yield f"Missing: {name}: {cell['error']}"
            yield ""
    waiting = Counter(cell["target"] for cell in missing if cell["error"] == _NOT_MEASURED)
    if waiting:
        by_target = ", ".join(f"{n} of `{target}`" for target, n in waiting.items())
        yield f"Not measured: {by_target}."
        yield ""
    for field, what in (
        ("n_cut", "longer than the model's window and lost their beginning"),
        ("n_unfinished", "to be answered in words reached the most tokens before an end"),
    ):
        found: dict[str, set[int]] = {}
        for cell in cells:
            if field in cell:
                place = f"{cell['benchmark']} ({cell['target']})"
                found.setdefault(place, set()).add(cell[field])
        names = [f"{_range(n)} of {place}" for place, n in found.items() if max(n)]
        if names:
            yield f"Test questions {what}, by method: {', '.join(names)}."
            yield ""


def _sizes(study: StudySettings, cells: Sequence[dict[str, Any]]) -> str:
    """Return the sizes of the splits, as drawn: a set may be smaller than asked for."""
    whole = {arm.name for arm in study.methods if arm.n_train is None}
    train = {cell["n_train"] for cell in cells if "n_train" in cell and cell["method"] in whole}
    test = {len(cell["items"]) for cell in cells if "items" in cell}
    return (
        f"{_range(train or {study.n_train})} train and up to {study.n_validation} validation "
        f"questions or texts a benchmark and {_range(test)} test questions, texts or prompts, "
        "unless the method's settings say otherwise"
    )


def _range(found: set[int]) -> str:
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low} to {high}"
