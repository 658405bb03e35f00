"""Pictures: their files, and marks where they belong."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from expertsteer.comparison import Comparison, ComparisonRow
from expertsteer.errors import ExpertSteerError, ParameterError
from expertsteer.layer_pair import LayerPair
from expertsteer.plots import picture_kind, plot_comparison, plot_information

TABLE = np.arange(15.0).reshape(5, 3)
COMPARISON = Comparison(
    rows=(
        ComparisonRow("unsteered", None, 0.0, (0.0, 0.0), 20.0),
        ComparisonRow("random vector", 0.01, -0.1, (-0.3, 0.2), 21.0),
        ComparisonRow("ExpertSteer", 0.6, 2.0, (1.5, 2.5), 25.0),
    ),
    pairs=(LayerPair(3, 1),),
    strength=0.1,
    n_prompts=6,
    n_sentences=6,
)
SVG = "{http://www.w3.org/2000/svg}"
BEGINNINGS = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF-"}


def draw_table(path):
    return plot_information(TABLE, [LayerPair(3, 1)], path)


def draw_rows(path):
    return plot_comparison(COMPARISON, path)


@pytest.mark.parametrize("draw", [draw_table, draw_rows])
@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf", "a.PNG"])
def test_the_suffix_chooses_the_kind_of_file(tmp_path, draw, name):
    path = draw(tmp_path / "deep" / name)
    assert path == tmp_path / "deep" / name
    assert path.read_bytes().startswith(BEGINNINGS[name[2:].lower()])
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.safetensors", ".png"])
def test_another_kind_is_refused_before_any_work(tmp_path, name):
    with pytest.raises(ParameterError, match=r"expected \.png, \.svg or \.pdf"):
        picture_kind(name)
    for draw in (plot_information, lambda _, __, path: plot_comparison(None, path)):
        with pytest.raises(ParameterError, match=r"expected \.png, \.svg or \.pdf"):
            draw(None, None, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("draw", [draw_table, draw_rows])
def test_what_cannot_be_written_leaves_nothing(tmp_path, draw, monkeypatch):
    path = tmp_path / "a.svg"
    path.write_text("old")

    def full(_figure, scratch, **_):
        Path(scratch).write_text("<svg")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("expertsteer.plots.Figure.savefig", full)
    with pytest.raises(ExpertSteerError, match="No space left"):
        draw(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class Picture:
    """An SVG written by matplotlib, read back in data coordinates of its first axes."""

    def __init__(self, path: Path, x_range, y_range) -> None:
        self.root = ElementTree.parse(path).getroot()
        frame = next(iter(self.group("axes_1").iter(f"{SVG}path"))).get("d")
        corners = np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", frame), dtype=float)
        self.low, self.high = corners.min(axis=0), corners.max(axis=0)
        self.x_range, self.y_range = x_range, y_range

    def group(self, name: str):
        return next(g for g in self.root.iter(f"{SVG}g") if g.get("id") == name)

    def marks(self, name: str) -> set[tuple[float, float]]:
        """Return where the marks of a group stand."""
        places = set()
        for mark in self.group(name).iter(f"{SVG}use"):
            across, down = (np.array([float(mark.get("x")), float(mark.get("y"))]) - self.low) / (
                self.high - self.low
            )
            (left, right), (bottom, top) = self.x_range, self.y_range
            x = left + across * (right - left)
            places.add((round(x, 2), round(top - down * (top - bottom), 2)))
        return places


def test_chosen_pairs_are_marked_at_their_layers(tmp_path):
    pairs = [LayerPair(4, 0), LayerPair(1, 2)]
    considered = [LayerPair(0, 0), LayerPair(3, 1), LayerPair(2, 2)]
    path = plot_information(TABLE, pairs, tmp_path / "a.svg", candidates=considered)
    # A cell is one wide and its layer in its middle: across the target, upwards the expert.
    picture = Picture(path, (-0.5, 2.5), (-0.5, 4.5))
    assert picture.marks("PathCollection_1") == {(0, 0), (1, 3), (2, 2)}
    assert picture.marks("PathCollection_2") == {(0, 4), (2, 1)}


def test_cells_show_the_table_the_same_way_round(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, _scratch, **_):
        (image,) = figure.axes[0].images
        drawn.update(values=image.get_array(), extent=image.get_extent(), origin=image.origin)

    monkeypatch.setattr("expertsteer.plots.Figure.savefig", keep)
    draw_table(tmp_path / "a.svg")
    assert np.array_equal(drawn["values"], TABLE)
    assert drawn["extent"] == [-0.5, 2.5, -0.5, 4.5]
    assert drawn["origin"] == "lower"


def test_a_picture_names_its_axes_and_rows(tmp_path):
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        plot_information(TABLE, [], tmp_path / "a.svg", expert="one", target="two")
        plot_comparison(COMPARISON, tmp_path / "b.svg")
    assert "layer of the expert (one)" in (tmp_path / "a.svg").read_text()
    assert "layer of the target (two)" in (tmp_path / "a.svg").read_text()
    rows = (tmp_path / "b.svg").read_text()
    assert rows.index("ExpertSteer") < rows.index("random vector") < rows.index("unsteered")
