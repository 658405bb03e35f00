"""Pictures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from expertsteer.plots import save_figure
from expertsteer.study.settings import ArmSettings, StudySettings

__all__ = ["Frame", "draw_figures", "labels_of", "transfer_shares"]

# Okabe and Ito's colours, told apart by most eyes; their yellow is too pale for lines.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# pandas comes without types.
Frame: TypeAlias = Any


def draw_figures(study: StudySettings, frame: Frame, averages: Frame, folder: Path) -> list[Path]:
    """Draw a study's pictures.

    Parameters
    ----------
    study : StudySettings
    frame : DataFrame
        See `cell_frame`.
    averages : DataFrame
        See `average_frame`.
    folder : Path

    Returns
    -------
    list of Path
        ``averages.png`` (change and effect by method), ``cells.png`` (every cell), and for
        a study with a sweep ``sweep.png``; with several targets and experts
        and one arm "rfm" ``transfer.png``, without shares of an own effect that is not
        clearly above 0, and not at all where none is.
    """
    written = [
        save_figure(_averages(study, averages), folder / "averages.png"),
        save_figure(_cells(study, frame), folder / "cells.png"),
    ]
    if study.sweep:
        draw = _trade_off if study.sweep == "strength_shares" else _sweep
        written.append(save_figure(draw(study, averages), folder / "sweep.png"))
    own = [arm.name for arm in study.methods if arm.method == "rfm"]
    if len(own) == 1 and averages["expert"].nunique() > 1 and averages["target"].nunique() > 1:
        is_clear = (averages["method"] == own[0]) & (averages["effect_low"] > 0)
        if is_clear.any():
            figure = _transfer(study, frame, own[0], set(averages["target"][is_clear]))
            written.append(save_figure(figure, folder / "transfer.png"))
    return written


def labels_of(frame: Frame) -> list[str]:
    """Return what rows are called: methods, with the expert where there are several."""
    many = frame["expert"].nunique() > 1
    return [
        f"{method} ({expert})" if many and isinstance(expert, str) else str(method)
        for method, expert in zip(frame["method"], frame["expert"], strict=True)
    ]


def _averages(study: StudySettings, averages: Frame) -> Figure:
    """Draw, by target, every method's average change, effect and damage."""
    targets = list(dict.fromkeys(averages["target"]))
    most = max(int((averages["target"] == target).sum()) for target in targets)
    shown = {"change": "change of right answers, points", "effect": "effect, nats"}
    shown = {name: title for name, title in shown.items() if averages[name].notna().any()}
    # In inches; the panels keep their width beside long labels.
    width = 3.3 * (len(shown) + 1) + 0.07 * max(map(len, labels_of(averages)))
    height = 1.2 + len(targets) * (0.9 + 0.27 * most)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(targets), len(shown) + 1, squeeze=False)
    for row, target in zip(grid, targets, strict=True):
        own = averages[averages["target"] == target].iloc[::-1]
        for axes, (name, title) in zip(row, shown.items(), strict=False):
            _forest(axes, own, name, labels_of(own) if axes is row[0] else [], title)
        last = row[-1]
        last.scatter(own["damage"], range(len(own)), color="tab:red", s=18)
        last.axvline(study.undamaged, color="grey", linewidth=0.8)
        last.axvline(study.budget, color="tab:red", linewidth=0.8, linestyle=":")
        last.set_yticks(range(len(own)), [""] * len(own))
        last.set_ylim(row[0].get_ylim())
        last.grid(axis="x", alpha=0.3)
        last.set_xlabel(_damage_label(study))
        last.xaxis.set_major_locator(MaxNLocator(5))
        row[0].set_title(target, loc="left", fontsize=10)
    return figure


def _forest(axes: Axes, rows: Frame, name: str, labels: list[str], title: str) -> None:
    places = np.arange(len(rows))
    means = rows[name].to_numpy(dtype=float)
    low, high = (rows[f"{name}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    axes.errorbar(means, places, xerr=[means - low, high - means], fmt="o", markersize=4, capsize=2)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(places, labels or [""] * len(places), fontsize=8)
    axes.set_ylim(-0.7, len(places) - 0.3)
    axes.set_xlabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", alpha=0.3)


def _cells(study: StudySettings, frame: Frame) -> Figure:
    """Draw the effect of every cell, a panel a target."""
    steered = frame[frame["method"] != "none"].copy()
    steered["label"] = labels_of(steered)
    targets = list(dict.fromkeys(steered["target"]))
    names = [b.name for b in study.benchmarks if b.name in set(steered["benchmark"])]
    n_rows = max(steered[steered["target"] == t]["label"].nunique() for t in targets)
    longest = max(map(len, steered["label"]))
    figure = Figure(
        figsize=(
            2 + 0.07 * longest + 0.55 * len(names),
            2.4 + len(targets) * (0.5 + 0.28 * n_rows),
        ),
        layout="constrained",
    )
    panels = figure.subplots(len(targets), 1, squeeze=False)[:, 0]
    bound = float(np.nanmax(np.abs(steered["effect"]))) or 1.0
    image: Any = None
    for axes, target in zip(panels, targets, strict=True):
        own = steered[steered["target"] == target]
        table = own.pivot_table(index="label", columns="benchmark", values="effect", sort=False)
        table = table.reindex(columns=names)
        clear = own.assign(clear=(own["effect_low"] > 0) | (own["effect_high"] < 0)).pivot_table(
            index="label", columns="benchmark", values="clear", sort=False
        )
        clear = clear.reindex(index=table.index, columns=names)
        image = axes.imshow(table, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        for (y, x), value in np.ndenumerate(table.to_numpy()):
            if not np.isnan(value):
                axes.text(
                    *(x, y, f"{value:.2f}"),
                    ha="center",
                    va="center",
                    fontsize=6,
                    weight="bold" if clear.iloc[y, x] == 1 else "normal",
                    color="white" if abs(value) > 0.7 * bound else "black",
                )
        axes.set_yticks(range(len(table)), list(table.index), fontsize=7)
        last = axes is panels[-1]
        axes.set_xticks(
            range(len(names)), names if last else [], rotation=60, ha="right", fontsize=7
        )
        axes.set_title(target, loc="left", fontsize=10)
    figure.colorbar(image, ax=list(panels), label="effect, nats (bold: interval excludes 0)")
    return figure


def _sweep(study: StudySettings, averages: Frame) -> Figure:
    """Draw the average effect over the values of one setting, a line a method.

    What the setting is nothing to is a level across the picture.
    """
    assert study.sweep is not None
    usual = getattr(study, study.sweep, None)
    given = {arm.name: getattr(arm, study.sweep) for arm in study.methods}
    values = {name: usual if value is None else value for name, value in given.items()}
    unset = ArmSettings.model_fields[study.sweep].default
    varied = {name for name, value in given.items() if value != unset}
    is_log = study.sweep in ("n_train", "n_beginnings")
    figure, panels = _effect_panels(averages)
    for axes, own in panels:
        swept = own["method"].map(values).dropna()
        lines = _lines(study, own)
        for n, (style, line) in enumerate(lines):
            line = line.assign(value=line["method"].map(values)).dropna(subset=["value"])
            line = line.sort_values("value")
            effect, low, high = line["effect"], line["effect_low"], line["effect_high"]
            if not varied.intersection(line["method"]):
                color = style["color"]
                axes.axhline(effect.item(), color=color, linestyle="--", label=style["label"])
                axes.axhspan(low.item(), high.item(), color=color, alpha=0.1, linewidth=0)
                continue
            # Side by side, as intervals of several lines would hide each other.
            aside = n - 0.5 * (len(lines) - 1)
            step = 0.006 * (swept.max() - swept.min())
            places = line["value"] * 1.02**aside if is_log else line["value"] + step * aside
            axes.errorbar(places, effect, (effect - low, high - effect), **style)
        axes.set_xlabel(study.sweep)
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        measured = sorted(set(swept))
        axes.set_xticks(measured, [f"{value:g}" for value in measured])
        _finish(axes)
    return figure


def _trade_off(study: StudySettings, averages: Frame) -> Figure:
    """Draw the average effect over the damage done for it, a line a method from no strength on."""
    shares = {
        arm.name: (arm.strength_shares or study.strength_shares)[0]
        for arm in study.methods
        if arm.uses_strength
    }
    figure, panels = _effect_panels(averages)
    for axes, own in panels:
        for style, line in _lines(study, own):
            line = line.assign(share=line["method"].map(shares)).sort_values("share")
            effect, low, high = line["effect"], line["effect_low"], line["effect_high"]
            axes.errorbar(line["damage"], effect, (effect - low, high - effect), **style)
            first = (study.undamaged, line["damage"].iloc[0]), (0, effect.iloc[0])
            axes.plot(*first, color=style["color"], linestyle=":", linewidth=1)
            for row in line.dropna(subset=["share"]).itertuples():
                axes.annotate(
                    f"{row.share:g}",
                    (row.damage, row.effect),
                    (5, -9),
                    textcoords="offset points",
                    fontsize=7,
                    color=style["color"],
                )
        axes.axvline(study.budget, color="tab:red", linewidth=0.8, linestyle=":")
        axes.set_xlabel(_damage_label(study))
        _finish(axes, title="numbers: share of the strength", title_fontsize=7)
    return figure


def _effect_panels(averages: Frame) -> tuple[Figure, list[tuple[Axes, Frame]]]:
    """Return a figure for the effect over something, and a panel and its rows a target."""
    targets = list(dict.fromkeys(averages["target"]))
    figure = Figure(figsize=(1 + 5 * len(targets), 4), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
    for axes, target in zip(panels, targets, strict=True):
        axes.set_title(target, loc="left", fontsize=10)
    panels[0].set_ylabel("effect, nats")
    rows = [averages[averages["target"] == target] for target in targets]
    return figure, list(zip(panels, rows, strict=True))


def _lines(study: StudySettings, rows: Frame) -> list[tuple[dict[str, Any], Frame]]:
    """Return how the line of every method and expert is drawn, whatever is swept, and its rows."""
    assert study.sweep is not None
    kinds = {arm.name: _kind(arm, study.sweep) for arm in study.methods}
    found = rows.groupby([rows["method"].map(kinds), "expert"], dropna=False, sort=False)
    return [
        (
            {
                "color": _COLORS[n % len(_COLORS)],
                "marker": _MARKERS[n % len(_MARKERS)],
                "markersize": 4,
                "label": f"{kind} ({expert})" if isinstance(expert, str) else str(kind),
            },
            line,
        )
        for n, ((kind, expert), line) in enumerate(found)
    ]


def _finish(axes: Axes, **legend: Any) -> None:
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    # One a panel: every target has experts of its own.
    axes.legend(fontsize=7, **legend)


def _damage_label(study: StudySettings) -> str:
    unit = " over unsteered" if study.damage == "perplexity" else ", nats a token"
    return f"{study.damage}{unit} (dotted: budget)"


def _kind(arm: ArmSettings, sweep: str) -> str:
    """Return what an arm is besides the setting that is swept."""
    settings = arm.model_dump(exclude_defaults=True, exclude={"method", "name", "expert", sweep})
    for options in ("aligner_options", "direction_options"):
        settings |= settings.pop(options, {})
    if arm.plain_text is not None:
        settings["plain_text"] = Path(arm.plain_text).stem
    return ", ".join([arm.method, *(f"{name} {value}" for name, value in settings.items())])


def transfer_shares(frame: Frame, method: str, own: str, by: Sequence[str] = ()) -> Frame:
    """Return a method's effect over that of an own vector, by expert and target.

    Parameters
    ----------
    frame : DataFrame
        See `cell_frame`.
    method, own : str
    by : sequence of str, optional
        Further columns to tell apart, such as "benchmark".

    Returns
    -------
    Series
        Of the effects summed over benchmarks (and seeds), so that one whose own effect is
        small does not decide it.
    """
    place = ["target", "benchmark", "seed"]
    below = frame[frame["method"] == own].set_index(place)["effect"].rename("own")
    both = frame[frame["method"] == method].join(below, on=place, how="inner")
    sums = both.groupby(["expert", "target", *by], sort=False)[["effect", "own"]].sum()
    return sums["effect"] / sums["own"]


def _transfer(study: StudySettings, frame: Frame, own: str, with_share: set[str]) -> Figure:
    """Draw, for every expert and target, the effect as a share of the target's own vector's."""
    steered = frame[frame["expert"].notna()]
    methods = list(dict.fromkeys(steered["method"]))
    # The same order both ways, so that a model and itself make the diagonal.
    names = list(dict.fromkeys(m.name for m in (*study.targets, *study.experts)))
    experts = [name for name in names if name in set(steered["expert"])]
    targets = [name for name in names if name in set(steered["target"])]
    clear = [name for name in targets if name in with_share]
    figure = Figure(
        figsize=(1.5 + (1.2 + 0.9 * len(targets)) * len(methods), 2.2 + 0.6 * len(experts)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    found = [
        transfer_shares(frame, method, own)
        .unstack("target")
        .reindex(index=experts, columns=clear)
        .reindex(columns=targets)
        .to_numpy(float)
        for method in methods
    ]
    known = [abs(share) for shares in found for share in shares.flat if not np.isnan(share)]
    bound = max(known, default=1.0)
    image: Any = None
    for axes, method, shares in zip(panels, methods, found, strict=True):
        image = axes.imshow(shares, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        for (y, x), value in np.ndenumerate(shares):
            if not np.isnan(value):
                color = "white" if abs(value) > 0.7 * bound else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(targets)), targets, rotation=40, ha="right", fontsize=7)
        axes.set_yticks(range(len(experts)), experts, fontsize=7)
        axes.set_title(method, fontsize=9)
        axes.set_xlabel("target" + ("" if clear == targets else " (blank: own effect unclear)"))
    panels[0].set_ylabel("expert")
    figure.colorbar(image, ax=list(panels), label="effect over own RFM's")
    return figure
