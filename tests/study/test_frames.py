"""Figures of a study from cells whose answers are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from expertsteer.evaluation import mean_interval
from expertsteer.study import frames
from expertsteer.study.frames import cell_frame
from expertsteer.study.settings import StudySettings

BASE = {
    "name": "made up",
    "targets": ["t"],
    "experts": ["e", "f"],
    "benchmarks": [{"name": "easy", "domain": "a"}, {"name": "hard", "domain": "b"}],
    "methods": ["none", "rfm", "pca", "expertsteer"],
    "instructions": {},
}
# What the unsteered models answer rightly of four questions.
UNSTEERED = {
    ("t", "easy"): [1, 0, 0, 0],
    ("e", "easy"): [1, 1, 0, 0],
    ("f", "easy"): [1, 0, 0, 0],
    ("t", "hard"): [1, 1, 0, 0],
    ("e", "hard"): [0, 0, 0, 0],
    ("f", "hard"): [1, 1, 1, 0],
}


def cell(target, benchmark, method, expert, right, log_odds, **more):
    values = {
        "target": target,
        "benchmark": benchmark,
        "method": method,
        "expert": expert,
        "seed": 0,
        "metric": "acc",
        "test": {"acc": right, "log_odds": log_odds},
        "damage": 1.0,
        "seconds": {"fit": 2.0, "test": 3.0},
    }
    return values | more


def made_up_cells():
    cells = [
        cell(
            *(target, benchmark, "none", None, right, [0.0] * 4),
            items=["q1", "q2", "q3", "q4"],
            asked=[f"{benchmark} {n}" for n in range(4)],
            n_tokens_test=2000,
        )
        for (target, benchmark), right in UNSTEERED.items()
    ]
    for benchmark in ("easy", "hard"):
        chosen = [{"effect": 0.5}], [{"effect": 0.1}]
        cells += [
            cell("t", benchmark, "rfm", None, [1, 1, 0, 0], [1.0] * 4, validation=chosen[0]),
            cell("t", benchmark, "pca", None, [0, 0, 0, 0], [-1.0] * 4, validation=chosen[1]),
        ]
        for expert, right in (("e", [1, 1, 1, 1]), ("f", [0, 0, 0, 0])):
            beats_zero = benchmark == "easy"
            cells.append(
                cell("t", benchmark, "expertsteer", expert, right, [3, 3, 1, 1.0])
                | {"beats_zero": beats_zero, "validation": [{"effect": 0.2}], "damage": 1.21}
            )
    return cells


@pytest.fixture
def study():
    return StudySettings.model_validate(BASE)


def average_frame(study, cells, domain=None):
    frame = cell_frame(study, cells)
    chosen = frame if domain is None or frame.empty else frame[frame["domain"] == domain]
    return frames.average_frame(study, cells, chosen)


def row_of(frame, method, expert=None):
    chosen = frame[frame["method"] == method]
    chosen = chosen[chosen["expert"].isna() if expert is None else chosen["expert"] == expert]
    (row,) = chosen.to_dict("records")
    return row


def test_the_expert_is_better_where_it_answers_more(study):
    frame = cell_frame(study, made_up_cells())
    steered = frame[frame["method"] == "expertsteer"].set_index(["benchmark", "expert"])
    assert steered["expert_better"].to_dict() == {
        ("easy", "e"): True,
        ("easy", "f"): False,  # as many
        ("hard", "e"): False,
        ("hard", "f"): True,
    }
    assert frame.loc[frame["expert"].isna(), "expert_better"].isna().all()


def test_averages_by_hand(study):
    averages = average_frame(study, made_up_cells())
    by_e, by_f = (row_of(averages, "expertsteer", expert) for expert in "ef")
    # easy: from 1 to 4 of 4; hard: from 2 to 4.
    assert by_e["change"] == pytest.approx((75 + 50) / 2)
    assert by_f["change"] == pytest.approx((-25 - 50) / 2)
    # Only one of them is a benchmark on which the expert is better.
    assert by_e["change_transferable"] == pytest.approx(75)
    assert by_f["change_transferable"] == pytest.approx(-50)
    # Only "easy" has a clear gain on the validation split.
    assert by_e["deployed"] == pytest.approx(75 / 2)
    assert (by_e["effect"], by_e["effect_own"]) == pytest.approx((2, 1))
    assert by_e["best_own"] == "rfm"
    assert by_e["change_own"] == pytest.approx(50)
    assert (by_e["n_items"], by_e["n_benchmarks"]) == (8, 2)
    assert by_e["damage"] == pytest.approx(1.21)
    assert by_e["fit_seconds"] == 2
    assert by_e["seconds_per_1000_tokens"] == pytest.approx(1.5)
    own = row_of(averages, "rfm")
    assert pd.isna(own["change_own"])
    assert pd.isna(own["effect_own"])
    assert pd.isna(own["change_transferable"])
    assert row_of(averages, "pca")["effect_own"] == pytest.approx(-2)


def test_benchmarks_are_won_and_lost_by_their_intervals(study):
    averages = average_frame(study, made_up_cells())

    def count(*place):
        row = row_of(averages, *place)
        return row["wins"], row["losses"]

    # Of "hard" all that can change does for "f": 2 of 4, an interval that ends at 0.
    assert mean_interval(np.array([-1, -1, 0, 0]))[1] == 0
    assert count("expertsteer", "e") == (1, 0)
    assert count("expertsteer", "f") == (0, 0)
    assert count("rfm") == (0, 0)


def test_domains_apart(study):
    averages = average_frame(study, made_up_cells(), "b")
    assert row_of(averages, "expertsteer", "e")["change"] == pytest.approx(50)
    # What is not measured yet has no averages.
    easy = [row for row in made_up_cells() if row["benchmark"] == "easy"]
    assert average_frame(study, easy, "b").empty
    assert average_frame(study, []).empty
    assert average_frame(study, [], "a").empty


def test_all_methods_against_one_of_them():
    reference = BASE | {"reference": "expertsteer", "experts": ["e"]}
    cells = [row for row in made_up_cells() if row["expert"] != "f" and row["target"] != "f"]
    averages = average_frame(StudySettings.model_validate(reference), cells)
    assert row_of(averages, "rfm")["effect_reference"] == pytest.approx(1 - 2)
    assert pd.isna(row_of(averages, "expertsteer", "e")["effect_reference"])


def test_items_that_benchmarks_share_are_no_new_ones(study):
    cells = made_up_cells()
    for row in cells:
        if row["method"] == "none":
            row["asked"] = [f"one prompt, number {n}" for n in range(4)]
    shared = row_of(average_frame(study, cells), "expertsteer", "e")
    apart = row_of(average_frame(study, made_up_cells()), "expertsteer", "e")
    assert (shared["n_items"], apart["n_items"]) == (4, 8)
    assert shared["effect"] == apart["effect"]
    width = shared["effect_high"] - shared["effect_low"]
    assert width > 1.2 * (apart["effect_high"] - apart["effect_low"])


def test_targets_and_methods_are_in_the_order_of_the_study():
    study = StudySettings.model_validate(BASE | {"targets": ["t", "a"], "experts": ["e"]})
    cells = [row for row in made_up_cells() if "f" not in (row["target"], row["expert"])]
    # As where the second target was measured first, and its methods the other way round.
    others = [row | {"target": "a"} for row in cells if row["target"] == "t"]
    cells = [*reversed(others), *cells]
    assert list(cell_frame(study, cells)["target"].unique()) == ["t", "a", "e"]
    averages = average_frame(study, cells)
    assert list(zip(averages["target"], averages["method"], strict=True)) == [
        (target, method) for target in "ta" for method in ("rfm", "pca", "expertsteer")
    ]
