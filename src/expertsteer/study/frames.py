"""A study's cells as frames: paired changes with intervals, and their averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from expertsteer.evaluation.intervals import mean_interval, strata_interval
from expertsteer.study.figures import Frame
from expertsteer.study.settings import StudySettings

__all__ = ["CELL_KEYS", "SHARES", "average_frame", "cell_frame"]

# Shares of right answers; the other metrics are in nats and have no common scale.
SHARES = ("acc", "acc_norm", "acc_letter", "exact_match")
# What tells the cells of a study apart.
CELL_KEYS = ("target", "benchmark", "method", "expert", "seed")
# What averages are of.
_AVERAGED = (
    "change",
    "change_own",
    "change_transferable",
    "deployed",
    "effect",
    "effect_own",
    "effect_reference",
    "judged",
    "repeated",
)
_OWN = ("mean_difference", "pca", "probe", "rfm")


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
        row = {key: cell[key] for key in CELL_KEYS} | {
            "domain": domains[cell["benchmark"]],
            "metric": metric,
            "n": len(cell["test"][metric]),
            "mean": float(np.mean(cell["test"][metric])),
        }
        for name, field in (("change", metric), ("effect", _in_nats(cell))):
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
            if expert is None or cell["expert"] is None or metric not in SHARES
            else float(np.mean(expert["test"][metric])) > float(np.mean(before["test"][metric]))
        )
        rows.append(row)
    return _in_order(study, pd.DataFrame(rows), "target")


class _Changes(NamedTuple):
    """What a cell changes in every test item, by the names of averages."""

    before: dict[str, Any]
    values: dict[str, np.ndarray]


class _Part(NamedTuple):
    """A benchmark's items, what they ask, and their mean changes over the seeds."""

    asked: list[str]
    values: np.ndarray


def average_frame(study: StudySettings, cells: Sequence[dict[str, Any]], frame: Frame) -> Frame:
    """Return a row a target, method and expert: averages over benchmarks.

    Parameters
    ----------
    study : StudySettings
    cells : sequence of dict
    frame : DataFrame
        See `cell_frame`: all of its rows, or those of a domain.

    Returns
    -------
    DataFrame
        Over the benchmarks that all methods of a target have. ``change``: of right answers,
        in points of a hundred, averaged over the benchmarks that count right answers;
        ``change_transferable``: the same where the unsteered expert is better than the target;
        ``effect``: of log-odds and preference in nats, over all. ``change_own`` and
        ``effect_own``: against the target's best own-vector method, which the validation split
        names; ``effect_reference``: against the study's ``reference``. ``deployed``: the change
        where cells without a clear gain on the validation split stay unsteered. ``judged``: the
        change of the judges' scores of continuations, and ``repeated`` that of their repetition
        (seq-rep-4). Intervals: 95 % bootstrap, items drawn anew within every benchmark, those
        that benchmarks share for all of them at once. ``n_items``: distinct ones. ``wins`` and
        ``losses``: benchmarks whose interval excludes 0. ``seconds_per_1000_tokens``: of the
        test questions, where none is answered in words.
    """
    if frame.empty:
        return frame
    # By target, benchmark, seed and method: the cells by their experts.
    cells_of: dict[tuple[Any, ...], dict[str | None, dict[str, Any]]] = {}
    for cell in cells:
        key = (cell["target"], cell["benchmark"], cell["seed"], cell["method"])
        cells_of.setdefault(key, {})[cell["expert"]] = cell
    frame = _complete(frame)
    best_own = _best_own(study, frame)
    rows = []
    for (target, method, expert), group in frame.groupby(
        ["target", "method", "expert"], dropna=False, sort=False
    ):
        if method == "none":
            continue
        expert = None if pd.isna(expert) else expert
        # What "own" and "reference" compare with, where it is not the method itself.
        others = {"own": best_own.get(target), "reference": study.reference}
        others = {name: other for name, other in others.items() if other not in (None, method)}
        parts: dict[str, list[_Part]] = {name: [] for name in _AVERAGED}
        wins = losses = 0
        tokens, seconds = 0, 0.0
        for benchmark, seeds in group.groupby("benchmark", sort=False):
            changes = []
            columns = (seeds[name] for name in ("seed", "beats_zero", "expert_better"))
            for seed, beats_zero, expert_better in zip(*columns, strict=True):
                place = (target, benchmark, seed)
                cell = cells_of[(*place, method)][expert]
                before = cells_of[(*place, "none")][None]
                compared = {
                    name: _counterpart(cells_of.get((*place, other), {}), expert)
                    for name, other in others.items()
                }
                values = _differences(cell, before, compared, beats_zero, expert_better)
                changes.append(_Changes(before, values))
                if before.get("n_tokens_test"):
                    tokens += before["n_tokens_test"]
                    seconds += cell["seconds"]["test"]
            for name in _AVERAGED:
                if any(name in change.values for change in changes):
                    parts[name].append(_by_item(changes, name))
            low, high = mean_interval(_by_item(changes, "shown").values)
            wins += low > 0
            losses += high < 0
        found: dict[str, Any] = {"target": target, "method": method, "expert": expert}
        for name in _AVERAGED:
            mean, low, high = _stratified(parts[name])
            found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        rows.append(
            found
            | {
                "n_benchmarks": group["benchmark"].nunique(),
                "n_items": len({item for part in parts["effect"] for item in part.asked}),
                "wins": wins,
                "losses": losses,
                "damage": _mean_damage(study, group["damage"]),
                "fit_seconds": float(group["fit_seconds"].mean()),
                "slowdown": float(group["slowdown"].median()),
                "seconds_per_1000_tokens": 1000 * seconds / tokens if tokens else None,
                "best_own": best_own.get(target),
            }
        )
    return _in_order(study, pd.DataFrame(rows), "target", "method")


def _in_order(study: StudySettings, frame: Frame, *columns: str) -> Frame:
    """Return the rows by targets or methods as the study names them, else as they are."""
    if frame.empty:
        return frame
    names = {
        # Unsteered, an expert has the place of a target.
        "target": [model.name for model in (*study.targets, *study.experts)],
        "method": [arm.name for arm in study.methods],
    }
    return frame.sort_values(
        list(columns),
        key=lambda values: values.map(names[str(values.name)].index),
        kind="stable",
        ignore_index=True,
    )


def _counterpart(
    by_expert: Mapping[str | None, dict[str, Any]], expert: str | None
) -> dict[str, Any] | None:
    """Return a method's cell of the same expert, or its only one."""
    if expert not in by_expert and len(by_expert) == 1:
        return next(iter(by_expert.values()))
    return by_expert.get(expert)


def _differences(
    cell: dict[str, Any],
    before: dict[str, Any],
    others: Mapping[str, dict[str, Any] | None],
    beats_zero: Any,
    expert_better: Any,
) -> dict[str, np.ndarray]:
    """Return the items' changes of a cell under the names of `_AVERAGED`.

    "shown" is the change of what the table shows, whatever it is.
    """
    test, metric = cell["test"], cell["metric"]
    field = _in_nats(cell)
    found = {
        "shown": np.subtract(test[metric], before["test"][metric]),
        "effect": np.subtract(test[field], before["test"][field]),
    }
    for name, other in others.items():
        if other is not None:
            found[f"effect_{name}"] = np.subtract(test[field], other["test"][field])
    if metric in SHARES:
        change = 100 * found["shown"]
        found |= {"change": change, "deployed": change if beats_zero else np.zeros_like(change)}
        own = others.get("own")
        if own is not None:
            found["change_own"] = 100 * np.subtract(test[metric], own["test"][metric])
        if pd.notna(expert_better) and expert_better:
            found["change_transferable"] = change
    for name, field in (("judged", "judged"), ("repeated", "rep_4")):
        if "judged" in test:
            found[name] = np.subtract(test[field], before["test"][field])
    return found


def _in_nats(cell: dict[str, Any]) -> str:
    return "log_odds" if "log_odds" in cell["test"] else "preference"


def _by_item(changes: Sequence[_Changes], name: str) -> _Part:
    """Return every item's mean over the seeds that drew it."""
    values: dict[str, list[float]] = {}
    asked: dict[str, str] = {}
    for before, of_cell in changes:
        if name not in of_cell:
            continue
        items = before["items"]
        # Rows of earlier releases do not say what was asked: nothing counts as shared then.
        texts = before.get("asked") or [f"{before['benchmark']} {item}" for item in items]
        for item, text, value in zip(items, texts, of_cell[name], strict=True):
            values.setdefault(item, []).append(float(value))
            asked[item] = text
    means = np.array([np.mean(of_item) for of_item in values.values()])
    return _Part([asked[item] for item in values], means)


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


def _stratified(parts: Sequence[_Part]) -> tuple[float | None, float | None, float | None]:
    """Return the mean of the parts' means and its interval, items drawn within each part."""
    if not parts:
        return None, None, None
    values = [part.values for part in parts]
    mean = float(np.mean([part.mean() for part in values]))
    weights = [1.0] * len(parts)
    return mean, *strata_interval(values, weights, [part.asked for part in parts])
