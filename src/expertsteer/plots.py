"""Pictures of what the method found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from expertsteer.arrays import Array
from expertsteer.calibration import Calibration
from expertsteer.comparison import Comparison
from expertsteer.errors import ParameterError
from expertsteer.files import replacing
from expertsteer.layer_pair import LayerPair

__all__ = [
    "picture_kind",
    "plot_calibration",
    "plot_comparison",
    "plot_information",
    "save_figure",
]


def picture_kind(path: str | Path) -> str:
    """Return the kind of picture that a file name asks for.

    Raises
    ------
    ParameterError
        Unless it is ``.png``, ``.svg`` or ``.pdf``.
    """
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise ParameterError(f"Got the picture {path}, but expected .png, .svg or .pdf.")
    return kind


def plot_information(
    table: Array,
    pairs: Sequence[LayerPair],
    path: str | Path,
    *,
    expert: str = "expert",
    target: str = "target",
    candidates: Sequence[LayerPair] = (),
) -> Path:
    """Draw the mutual information table with the chosen pairs.

    Parameters
    ----------
    table : array of shape (n_expert_layers, n_target_layers)
        In nats.
    pairs : sequence of LayerPair
        The pairs chosen, marked by a red dot.
    path : str or Path
        ``.png``, ``.svg`` or ``.pdf``.
    expert, target : str
        Names for the axes.
    candidates : sequence of LayerPair, optional
        Pairs that were considered, marked by a white dot in a red ring.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ParameterError
        On another kind of picture.
    """
    picture_kind(path)
    values = np.asarray(table)
    n_expert, n_target = values.shape
    figure = Figure(figsize=(1.8 + 0.32 * n_target, 1.6 + 0.22 * n_expert), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axes, label="mutual information (nats)")
    for marked, face, label in ((candidates, "white", "considered"), (pairs, "tab:red", "chosen")):
        if marked:
            axes.scatter(
                [pair.target_layer for pair in marked],
                [pair.expert_layer for pair in marked],
                s=70,
                facecolors=face,
                edgecolors="tab:red",
                linewidths=2,
                label=label,
                clip_on=False,
                zorder=3,
            )
    axes.set_xlabel(f"layer of the target ({target})")
    axes.set_ylabel(f"layer of the expert ({expert})")
    axes.set_xticks(range(0, n_target, max(1, n_target // 12)))
    axes.set_yticks(range(0, n_expert, max(1, n_expert // 12)))
    if pairs or candidates:
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return save_figure(figure, path)


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Draw what every vector does, and at what price.

    Parameters
    ----------
    comparison : Comparison
    path : str or Path
        ``.png``, ``.svg`` or ``.pdf``.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ParameterError
        On another kind of picture.
    """
    picture_kind(path)
    rows = comparison.rows[::-1]
    places = np.arange(len(rows))
    effects = np.array([row.effect for row in rows])
    intervals = np.array([row.effect_interval for row in rows])
    figure = Figure(figsize=(9.5, 0.9 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.4, 1))
    colours = ["tab:red" if row.method == "ExpertSteer" else "tab:gray" for row in rows]
    left.barh(places, effects, color=colours, height=0.62)
    left.errorbar(
        effects,
        places,
        xerr=np.abs(intervals.T - effects),
        fmt="none",
        ecolor="black",
        elinewidth=1.2,
        capsize=3,
    )
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(places, [row.method for row in rows])
    left.set_xlabel("effect: change of log-odds, nats")
    right.scatter([row.perplexity for row in rows], places, color=colours, s=45)
    right.axvline(rows[-1].perplexity, color="black", linewidth=0.8, linestyle=":")
    right.set_xscale("log")
    right.set_xlabel("damage: perplexity, log scale")
    right.grid(axis="x", alpha=0.4)
    return save_figure(figure, path)


def plot_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Draw what every trial of a calibration gained against what it cost.

    Parameters
    ----------
    calibration : Calibration
    path : str or Path
        ``.png``, ``.svg`` or ``.pdf``.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ParameterError
        On another kind of picture.
    """
    picture_kind(path)
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    measured = [trial for trial in calibration.trials if trial.effect_interval is not None]
    for layers in sorted({trial.layers for trial in measured}):
        chosen = sorted((t for t in measured if t.layers == layers), key=lambda t: t.strength)
        effects = np.array([trial.effect for trial in chosen])
        intervals = np.array([trial.effect_interval for trial in chosen])
        axes.errorbar(
            [trial.damage for trial in chosen],
            effects,
            yerr=np.abs(intervals.T - effects),
            marker="o",
            capsize=3,
            label=f"layers {', '.join(map(str, layers))}",
        )
        for trial in chosen:
            axes.annotate(
                f"{trial.strength:.2g}",
                (trial.damage, trial.effect or 0.0),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
            )
    if calibration.chosen is not None:
        axes.scatter(
            calibration.chosen.damage,
            calibration.chosen.effect or 0.0,
            s=160,
            facecolors="none",
            edgecolors="tab:red",
            linewidths=2,
            label="chosen",
            zorder=3,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(calibration.budget, color="tab:red", linestyle=":", label="budget")
    units = "perplexity, times unsteered" if calibration.damage == "perplexity" else "KL, nats"
    axes.set_xlabel(f"damage to plain text: {units}")
    axes.set_ylabel("effect on validation (nats); labels: strength")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all."""
    path = Path(path)
    FigureCanvasAgg(figure)
    with replacing(path) as scratch:
        figure.savefig(scratch, format=picture_kind(path), dpi=150)
    return path
