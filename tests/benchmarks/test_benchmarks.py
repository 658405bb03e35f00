"""The harness of the benchmarks, and the page made from what it writes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import load_script, tiny_language_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"

timing = load_script(FOLDER / "timing.py")
report = load_script(FOLDER / "report.py")
bound = load_script(FOLDER / "bound.py")
machine = load_script(FOLDER / "recursive_feature_machine.py")

BENCHMARK = '''
"""Two ways to wait."""
import os, sys, time
sys.path.insert(0, {folder!r})
from timing import OURS, Case, Goal, main

def prepare():
    if "--way" in sys.argv and os.environ.get("FAIL_ALONE"):
        sys.exit("it was killed")
    with open("calls.txt", "a") as file:
        file.write("prepared\\n")
    return {{OURS: lambda: wait(0.01, 1), "peer": lambda: wait(0.04, 2)}}

def wait(seconds, which):
    held = bytearray(64 << 20) if which == 2 else None
    time.sleep(seconds)
    return which

def cases(quick):
    return [
        Case(name, f"Wait {{name}}", {{"quick": quick}}, prepare, (
            Goal(f"ratio peer / {{OURS}}", at_least=1.5), Goal("sum", at_most=2)),
            compare=lambda found: {{"sum": sum(found.values())}}, scale={{"peer": 2.0}},
            work={{OURS: ("float32", 1e9)}}, memory=name == "long")
        for name in ("short", "long")
    ]

main(__file__, __doc__, cases)
'''


def test_ways_take_turns_in_changing_order():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds, _ = timing.take_turns(ways, 3, {"c": 1})
    # The first turn is not timed.
    turns = [calls[:2], calls[2:5], calls[5:7], calls[7:]]
    assert [sorted(turn) for turn in turns] == [["a", "b"], ["a", "b", "c"], ["a", "b"], ["a", "b"]]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 1}
    calls.clear()
    timing.take_turns(ways, 60)
    orders = {"".join(calls[n : n + 3]) for n in range(0, len(calls), 3)}
    assert orders == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_ratios_are_taken_round_by_round():
    figures = timing.figures_of({"expertsteer": [1.0, 2.0], "x": [4.0, 8.0], "y": [9.0, 6.0]}, "xy")
    assert figures["ratio x / expertsteer"] == {"median": 4.0, "range": [4.0, 4.0], "rounds": 2}
    assert figures["ratio best / expertsteer"]["range"] == [3.0, 4.0]
    assert figures["ratio expertsteer / x"]["median"] == 0.25
    assert figures["seconds y"]["median"] == 7.5


@pytest.mark.parametrize(
    ("value", "reached"), [(19.9, False), (20.0, True), (30.0, True), (31.0, False), (None, False)]
)
def test_goals(value, reached):
    assert timing.Goal("x", at_least=20, at_most=30).reached_by(value) is reached


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "waiting.py"
    path.write_text(BENCHMARK.format(folder=str(FOLDER)), encoding="utf-8")

    def run(*options):
        command = [sys.executable, path, "--threads", "1", "--rounds", "2", *options]
        return subprocess.run(
            [*command, "--output", tmp_path], capture_output=True, text=True, cwd=tmp_path
        )

    return run


def test_a_benchmark_measures_goes_on_and_is_shown(run, tmp_path):
    # One case first, as if interrupted: the other goes on from there.
    done = run("--case", "short")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "waiting.json"
    first = json.loads(path.read_text())["cases"]
    assert list(first) == ["short"]
    assert run().returncode == 0
    results = json.loads(path.read_text())
    assert results["cases"]["short"] == first["short"]
    case = results["cases"]["long"]
    assert [goal["reached"] for goal in case["goals"]] == [True, False]
    figures = case["figures"]
    assert figures["sum"]["median"] == 3
    # What the machine reaches is measured in turn, and is no way to do the work.
    rounds = figures["seconds expertsteer"]["rounds"]
    assert figures["giga a second reach float32"]["rounds"] == rounds
    assert "reach float32" not in case["ways"]
    # A share of the work is timed and multiplied.
    assert figures["seconds peer"]["median"] > 0.08
    assert figures["giga a second expertsteer"]["median"] < 100
    # Each way runs alone for its memory, and only one of them takes 64 MiB.
    assert figures["more_mib peer"]["median"] > 50
    assert figures["more_mib expertsteer"]["median"] < 50
    # Prepared once a case for the times, and once a way for the memory of the second.
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 2 + 2

    report_of = {"start_up": results}
    tables = report.tables(report_of)
    assert re.search(r"\| Wait long \| sum \| ≤ 2 \| 3, missed \|", tables["goals"])
    assert "peer (a share, × 2)" in tables["times"]
    (picture,) = report.draw(report_of, tmp_path)
    assert "Wait long: peer" in picture.read_text()


def test_what_was_timed_outlives_an_interruption(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_ALONE", "1")
    assert "long by expertsteer failed alone" in run("--case", "long").stderr
    path = tmp_path / "waiting.json"
    broken = json.loads(path.read_text())
    assert broken["cases"] == {}
    assert set(report.tables({"start_up": broken}).values()) - {report.NOTHING}
    assert "Wait" not in report.tables({"start_up": broken})["goals"]
    monkeypatch.delenv("FAIL_ALONE")
    assert run("--case", "long").returncode == 0
    found = json.loads(path.read_text())
    assert "unfinished" not in found
    timed = broken["unfinished"]["long"]
    assert found["cases"]["long"]["seconds"] == timed["seconds"]
    assert found["cases"]["long"]["figures"].items() > timed["figures"].items()


@pytest.mark.parametrize(
    ("others", "said"),
    [(0.9, ", missed |"), (0.99, ", undecided: 95 %"), (1.01, ", undecided: 95 %"), (1.2, ") |")],
)
def test_a_goal_within_the_noise_is_undecided(others, said):
    figure = "ratio peer / expertsteer"
    noise = [0.9, 1.1, 0.95, 1.05, 1.0] * 4
    seconds = {"expertsteer": [1.0] * len(noise), "peer": [others * x for x in noise]}
    case = {
        "title": "Wait",
        "seconds": seconds,
        "figures": {figure: timing.summary(seconds["peer"])},
        "goals": [{"figure": figure, "at_least": 1.0, "at_most": None, "reached": others >= 1}],
    }
    assert said in report._goals({"start_up": {"cases": {"wait": case}}})


def test_results_of_other_threads_are_not_mixed(run, tmp_path):
    path = tmp_path / "waiting.json"
    path.write_text(json.dumps({"threads": 64, "cases": {}}))
    refused = run()
    assert refused.returncode != 0
    assert "--again" in refused.stderr


def test_the_page_says_so_where_there_are_no_results():
    assert set(report.tables({}).values()) == {report.NOTHING}


def test_the_profile_times_every_step_of_a_fit(monkeypatch):
    monkeypatch.setattr(bound, "TARGET", tiny_language_model("llama"))
    monkeypatch.setattr(bound, "EXPERT", tiny_language_model("gpt2"))
    assert bound.profiled_fit(40).keys() == {*bound.STEPS, "rest"}


def test_all_layers_in_one_batch_have_the_same_directions():
    states, labels = machine.problem(64, 128, 3)
    one_by_one, together = machine.ours(states, labels), machine.in_one_batch(states, labels)
    torch.testing.assert_close(together, one_by_one, rtol=1e-3, atol=1e-4)
