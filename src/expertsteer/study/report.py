"""A study's figures from its cells: changes with paired intervals, averages, tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from expertsteer.errors import DataError
from expertsteer.evaluation.intervals import mean_interval, strata_interval
from expertsteer.evaluation.row_file import read_json_lines
from expertsteer.files import write_text
from expertsteer.study.figures import Frame, draw_figures, labels_of
from expertsteer.study.settings import StudySettings

__all__ = [
    "MEASURES",
    "average_frame",
    "average_table",
    "cell_frame",
    "load_cells",
    "notes",
    "write_report",
]

# Shares of right answers; the other metrics are in nats and have no common scale.
_SHARES = ("acc", "acc_norm", "acc_letter", "exact_match")
_OWN = ("mean_difference", "pca", "probe", "rfm")


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
        ``machine``, ``versions``, and ``missing``: what cells could not be had, and why.

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
    study = StudySettings.model_validate(about.pop("settings"))
    rows = {row["fingerprint"]: row for row in read_json_lines(folder / "cells.jsonl")}
    cells, missing = [], []
    for named in about.pop("cells"):
        row = rows.get(named["fingerprint"], {})
        if "test" in row:
            cells.append(row | named)
        elif "error" in row:
            missing.append({key: named[key] for key in _KEYS} | {"error": row["error"]})
    return study, cells, about | {"missing": missing}


# What the columns of all studies' tables are.
MEASURES = (
    "Shares of right answers in per cent; preference in nats a token. `*`: the unsteered expert "
    "answers no more questions rightly than the target, so there is nothing to transfer. Judged: "
    "the judge's score of what is written after the test prompts; repeated: the share of its "
    "4-grams of words that occurred in it before. Intervals: 95 % paired bootstrap over items. "
    "Averages are over the benchmarks that all methods of the target have. Deployed: cells without "
    "a clear gain on the validation split stay unsteered. Damage: on plain text, over unsteered. "
    "Fit: seconds of work. Time: of the test questions, over unsteered."
)

# What averages are of.
_AVERAGED = ("change", "change_own", "deployed", "effect", "judged", "repeated")
_KEYS = ("target", "benchmark", "method", "expert", "seed")


def cell_frame(study: StudySettings, cells: Sequence[dict[str, Any]]) -> Frame:
    """Return a row a cell: means, paired changes from unsteered with intervals, damage.

    Parameters
    ----------
    study : StudySettings
    cells : sequence of dict

    Returns
    -------
    DataFrame
        ``mean`` and ``change`` are of the benchmark's own ``metric``, ``effect`` is the
        change of log-odds or preference, in nats; each with a 95 % paired bootstrap
        interval (``_low``, ``_high``). ``expert_better`` says whether the unsteered expert
        answers more questions rightly than the unsteered target.
    """
    unsteered = {
        (cell["target"], cell["benchmark"], cell["seed"]): cell
        for cell in cells
        if cell["method"] == "none"
    }
    domains = {b.name: b.domain for b in study.benchmarks}
    rows = []
    for cell in cells:
        before = unsteered.get((cell["target"], cell["benchmark"], cell["seed"]))
        if before is None or cell["benchmark"] not in domains:
            continue
        metric = cell["metric"]
        row = {key: cell[key] for key in _KEYS} | {
            "domain": domains[cell["benchmark"]],
            "metric": metric,
            "n": len(cell["test"][metric]),
            "mean": float(np.mean(cell["test"][metric])),
        }
        in_nats = "log_odds" if "log_odds" in cell["test"] else "preference"
        for name, field in (("change", metric), ("effect", in_nats)):
            difference = np.subtract(cell["test"][field], before["test"][field])
            low, high = mean_interval(difference)
            row |= {name: float(difference.mean()), f"{name}_low": low, f"{name}_high": high}
        row["damage"] = cell["damage"]
        row["strength"] = cell.get("strength")
        row["beats_zero"] = cell.get("beats_zero")
        tried = [trial["effect"] for trial in cell.get("validation", [])]
        row["validation_effect"] = max(tried, default=None)
        row["fit_seconds"] = cell["seconds"]["fit"]
        row["slowdown"] = cell["seconds"]["test"] / max(before["seconds"]["test"], 1e-9)
        expert = unsteered.get((cell["expert"], cell["benchmark"], cell["seed"]))
        row["expert_better"] = (
            None
            if expert is None or cell["expert"] is None or metric not in _SHARES
            else float(np.mean(expert["test"][metric])) > float(np.mean(before["test"][metric]))
        )
        rows.append(row)
    return pd.DataFrame(rows)


def average_frame(
    study: StudySettings, cells: Sequence[dict[str, Any]], domain: str | None = None
) -> Frame:
    """Return a row a target, method and expert: averages over benchmarks.

    Parameters
    ----------
    study : StudySettings
    cells : sequence of dict
    domain : str, optional
        Only the benchmarks of a domain.

    Returns
    -------
    DataFrame
        Over the benchmarks that all methods of a target have. ``change``: of right answers,
        in points of a hundred, averaged over the benchmarks that count right answers;
        ``effect``: of log-odds and preference in nats, over all. Intervals: 95 % bootstrap,
        items drawn anew within every benchmark. ``change_own``:
        against the target's best own-vector method, which the validation split names.
        ``deployed``: the change where cells without a clear gain on the validation split
        stay unsteered. ``judged``: the change of the judges' scores of continuations, and
        ``repeated`` that of their repetition (seq-rep-4). ``wins`` and ``losses``:
        benchmarks whose interval excludes 0.
    """
    frame = cell_frame(study, cells)
    if domain is not None:
        frame = frame[frame["domain"] == domain]
    by_key = {tuple(cell[key] for key in _KEYS): cell for cell in cells}
    frame = _complete(frame)
    best_own = _best_own(study, frame)
    rows = []
    order = [arm.name for arm in study.methods]
    for (target, method, expert), group in frame.groupby(
        ["target", "method", "expert"], dropna=False, sort=False
    ):
        if method == "none":
            continue
        expert = None if pd.isna(expert) else expert
        parts: dict[str, list[np.ndarray]] = {name: [] for name in _AVERAGED}
        for benchmark, seeds in group.groupby("benchmark", sort=False):
            by_seed: dict[str, list[tuple[list[str], np.ndarray]]] = {
                name: [] for name in _AVERAGED
            }
            for row in seeds.itertuples():
                cell = by_key[target, benchmark, method, expert, row.seed]
                before = by_key[target, benchmark, "none", None, row.seed]
                own = by_key.get((target, benchmark, best_own.get(target), None, row.seed))
                for name, values in _differences(cell, before, own, row.beats_zero).items():
                    by_seed[name].append((before["items"], values))
            for name, found_by_seed in by_seed.items():
                if found_by_seed:
                    parts[name].append(_by_item(found_by_seed))
        if method == best_own.get(target):
            parts["change_own"] = []
        found: dict[str, Any] = {"target": target, "method": method, "expert": expert}
        for name in _AVERAGED:
            mean, low, high = _stratified(parts[name])
            found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append(
            found
            | {
                "n_benchmarks": group["benchmark"].nunique(),
                "n_items": sum(map(len, parts["effect"])),
                "wins": _count(group, group["change_low"] > 0),
                "losses": _count(group, group["change_high"] < 0),
                "damage": _mean_damage(study, group["damage"]),
                "fit_seconds": float(group["fit_seconds"].mean()),
                "slowdown": float(group["slowdown"].median()),
                "best_own": best_own.get(target),
            }
        )
    result = pd.DataFrame(rows)
    if len(result):
        result["order"] = result["method"].map(order.index)
        result = result.sort_values(["target", "order"], kind="stable").drop(columns="order")
    return result.reset_index(drop=True)


def _differences(
    cell: dict[str, Any], before: dict[str, Any], own: dict[str, Any] | None, beats_zero: Any
) -> dict[str, np.ndarray]:
    """Return the items' changes of a cell under the names of `_AVERAGED`."""
    test, metric = cell["test"], cell["metric"]
    field = "log_odds" if "log_odds" in test else "preference"
    found = {"effect": np.subtract(test[field], before["test"][field])}
    if metric in _SHARES:
        change = 100 * np.subtract(test[metric], before["test"][metric])
        found |= {"change": change, "deployed": change if beats_zero else np.zeros_like(change)}
        if own is not None:
            found["change_own"] = 100 * np.subtract(test[metric], own["test"][metric])
    for name, field in (("judged", "judged"), ("repeated", "rep_4")):
        if "judged" in test:
            found[name] = np.subtract(test[field], before["test"][field])
    return found


def _by_item(seeds: Sequence[tuple[list[str], np.ndarray]]) -> np.ndarray:
    """Return every item's mean over the seeds that drew it."""
    values: dict[str, list[float]] = {}
    for items, differences in seeds:
        for item, difference in zip(items, differences, strict=True):
            values.setdefault(item, []).append(float(difference))
    return np.array([np.mean(of_item) for of_item in values.values()])


def _count(group: Frame, chosen: Any) -> int:
    return int(group.loc[chosen, "benchmark"].nunique())


def _mean_damage(study: StudySettings, damage: Any) -> float:
    """Return the mean damage: of ratios the geometric one."""
    if study.damage == "perplexity":
        return float(np.exp(np.log(damage).mean()))
    return float(damage.mean())


def _complete(frame: Frame) -> Frame:
    """Return the cells of benchmarks that every method of a target has.

    Averages over others would compare methods on different questions.
    """
    kept = []
    for _, group in frame.groupby("target", sort=False):
        drawn = list(zip(group["benchmark"], group["seed"], strict=True))
        had: dict[Any, set[Any]] = {}
        for method, expert, place in zip(group["method"], group["expert"], drawn, strict=True):
            if method != "none":
                had.setdefault((method, str(expert)), set()).add(place)
        common = set.intersection(*had.values()) if had else set()
        kept.append(group[[place in common for place in drawn]])
    return pd.concat(kept)


def _best_own(study: StudySettings, frame: Frame) -> dict[Any, str]:
    """Return, by target, the own-vector method of the best mean rank on the validation split."""
    own = [arm.name for arm in study.methods if arm.method in _OWN]
    chosen = frame[frame["method"].isin(own)]
    if chosen.empty:
        return {}
    # By rank, since log-odds and preferences have no common scale.
    table = chosen.pivot_table(
        index=["target", "benchmark", "seed"], columns="method", values="validation_effect"
    )
    ranks = table.rank(axis=1).groupby("target").mean()
    return {target: row.idxmax() for target, row in ranks.iterrows() if row.notna().any()}


def _stratified(parts: Sequence[np.ndarray]) -> tuple[float | None, float | None, float | None]:
    """Return the mean of the parts' means and its interval, items drawn within each part."""
    if not parts:
        return None, None, None
    mean = float(np.mean([part.mean() for part in parts]))
    return mean, *strata_interval(parts, [1.0] * len(parts))


def write_report(folder: str | Path) -> list[Path]:
    """Write a study's tables and pictures from its cells.

    Parameters
    ----------
    folder : str or Path
        Where `run_study` wrote.

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
    frame, averages = cell_frame(study, cells), average_frame(study, cells)
    if averages.empty:
        missing = about["missing"]
        reason = f" A cell could not be had: {missing[0]['error']}" if missing else ""
        raise DataError(
            f"Got {folder}, but expected a study with a benchmark that all methods of a target "
            f"have finished. Run it on.{reason}"
        )
    values = {
        "averages": json.loads(averages.to_json(orient="records", double_precision=5)),
        "cells": json.loads(frame.to_json(orient="records", double_precision=5)),
        "settings": study.model_dump(mode="json"),
    } | about
    written = [folder / "report.json", folder / "report.md", folder / "report.tex"]
    write_text(written[0], json.dumps(values, indent=1))
    write_text(written[1], _markdown(study, frame, averages, about))
    write_text(written[2], _latex(study, frame, averages))
    return written + draw_figures(study, frame, averages, folder)


def _markdown(study: StudySettings, frame: Frame, averages: Frame, about: dict[str, Any]) -> str:
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
        lines += [average_table(averages, target).to_markdown(index=False, missingval=""), ""]
    lines += [MEASURES, "", *notes(study, about)]
    return "\n".join(lines) + "\n"


def _latex(study: StudySettings, frame: Frame, averages: Frame) -> str:
    parts = []
    for target in averages["target"].unique():
        table = _target_table(study, frame, target)
        parts.append(table.to_latex(caption=f"{study.name}: {target}", escape=True))
    return "\n".join(parts)


def _unsteered_table(study: StudySettings, frame: Frame) -> Frame:
    plain = frame[frame["method"] == "none"]
    shares = set(plain.loc[plain["metric"].isin(_SHARES), "benchmark"])
    table = plain.pivot_table(index="target", columns="benchmark", values="mean")
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
    own["shown"] = np.where(own["metric"].isin(_SHARES), 100 * own["mean"], own["mean"])
    own["label"] = labels_of(own)
    means = own.groupby(["label", "benchmark"], sort=False)["shown"].mean().unstack("benchmark")
    shares = set(own.loc[own["metric"].isin(_SHARES), "benchmark"])
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


def average_table(averages: Frame, target: str) -> Frame:
    """Return a target's averages as a table for people."""
    own = averages[averages["target"] == target]
    rows = []
    for label, row in zip(labels_of(own), own.to_dict("records"), strict=True):
        rows.append(
            {
                "method": label,
                "change, points": _interval(row, "change", 1),
                "against best own vector": _interval(row, "change_own", 1),
                "deployed": _interval(row, "deployed", 1),
                "effect, nats": _interval(row, "effect", 2),
                "judged": _interval(row, "judged", 2),
                "repeated": _interval(row, "repeated", 2),
                "items": row["n_items"],
                "won / lost": f"{row['wins']} / {row['losses']} of {row['n_benchmarks']}",
                "damage": _shown(row["damage"], 3),
                "fit, s": _shown(row["fit_seconds"], 1),
                "time, x": _shown(row["slowdown"], 2),
            }
        )
    table = pd.DataFrame(rows)
    # Where no benchmark counts right answers, there are no points.
    return table.loc[:, (table != "").any()]


def _interval(row: dict[str, Any], name: str, digits: int) -> str:
    if row[name] is None or row[name] != row[name]:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def notes(study: StudySettings, about: dict[str, Any]) -> Iterable[str]:
    """Yield what a reader of one study's tables has to know: sizes, machine, versions."""
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    for cell in about["missing"]:
        name = ", ".join(str(cell[key]) for key in _KEYS if cell[key] is not None)
        yield f"Missing: {name}: {cell['error']}"
        yield ""
    sizes = (
        f"{study.n_train} train and {study.n_validation} validation questions or texts a benchmark "
        f"and {study.n_test or 'all'} test questions, unless its settings say otherwise (half of "
        "the prompts where words are measured)"
    )
    yield (
        f"{sizes}; seeds {', '.join(map(str, study.seeds))}. Every vector is as strong as a "
        f"{study.damage} budget of {study.budget:g} on other plain text allows. Machine: "
        f"{machine['processor']} ({machine['instructions']}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {', '.join(machine['accelerators']) or 'no accelerator'}; "
        f"{versions}."
    )
