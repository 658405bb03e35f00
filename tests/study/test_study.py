"""A study runs every cell once, whatever interrupts it, and reports what it measured."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import pytest
import yaml

from expertsteer import ExpertSteer, collect_states
from expertsteer.data import load_examples
from expertsteer.errors import DataError, ExpertSteerError
from expertsteer.evaluation import mean_interval
from expertsteer.evaluation.judges import ClassifierJudge, VaderJudge
from expertsteer.provenance import describe_machine
from expertsteer.study import load_study, measuring, run_study
from expertsteer.study.figures import draw_figures
from expertsteer.study.frames import average_frame, cell_frame
from expertsteer.study.measuring import TargetBench
from expertsteer.study.plain import PlainText
from expertsteer.study.report import load_cells, write_report
from expertsteer.study.settings import PlainSource
from expertsteer.study.subjects import Subject, load_benchmark
from helpers import interruptible, tiny_language_model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(path, folder, cache, **options):
    return run_study(load_study(path), folder, cache_dir=cache, progress=False, **options)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def keys(rows):
    return [(r["target"], r["benchmark"], r["method"], r["expert"], r["seed"]) for r in rows]


def test_cells_measures_and_report(study_file, tmp_path, cache):
    folder = tmp_path / "out"
    plans = []
    rows = run(study_file(), folder, cache, on_plan=lambda *plan: plans.append(plan))
    # Two benchmarks: seven methods on the target, and the expert as it is.
    assert plans[0][:2] == (16, 16)
    assert plans[0][2] > 0
    assert len(set(keys(rows))) == len(rows) == 16
    # There is nothing to put an instruction before where texts are only read.
    (refused,) = [row for row in rows if "error" in row]
    assert (refused["method"], refused["benchmark"]) == ("prompt", "texts")
    by_method = {row["method"]: row for row in rows if row["benchmark"] == "questions"}
    steered = by_method["expertsteer"]
    assert len(steered["test"]["acc_norm"]) == 12
    assert set(steered["test"]["acc_norm"]) <= {0.0, 1.0}
    assert steered["pairs"][0][1] in {1, 2}
    assert 0 < steered["strength"] <= steered["strongest"]
    assert steered["test"]["log_odds"] != by_method["none"]["test"]["log_odds"]
    written = {path.name for path in write_report(folder)}
    assert written == {"report.json", "report.md", "report.tex", "averages.png", "cells.png"}
    report = (folder / "report.md").read_text()
    for method in ("random", "expertsteer", "transferred", "prompt"):
        assert f"| {method}" in report
    assert "Missing: small, texts, prompt, 0: Got the method 'prompt' on labelled texts" in report
    study, cells, _ = load_cells(folder)
    frame = cell_frame(study, cells).set_index(["benchmark", "method", "target"])
    change = np.subtract(steered["test"]["acc_norm"], by_method["none"]["test"]["acc_norm"])
    shown = frame.loc[("questions", "expertsteer", "small")]
    assert shown["change"] == pytest.approx(change.mean())
    assert (shown["change_low"], shown["change_high"]) == pytest.approx(mean_interval(change))
    averages = average_frame(study, cells, cell_frame(study, cells)).set_index("method")
    # Only the questions count right answers.
    assert averages.loc["expertsteer", "change"] == pytest.approx(100 * change.mean())
    assert averages.loc["expertsteer", "best_own"] == "mean_difference"
    assert np.isnan(averages.loc["mean_difference", "change_own"])


def test_an_interrupted_study_goes_on_with_no_row_twice_and_none_lost(
    study_file, tmp_path, cache, monkeypatch
):
    whole = run(study_file(), tmp_path / "whole", cache)
    folder = tmp_path / "halted"
    original, calls = TargetBench.run, []

    def halting(self, *args):
        calls.append(args[0].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(TargetBench, "run", halting)
    with pytest.raises(KeyboardInterrupt):
        run(study_file(), folder, cache)
    n_before = len(rows_of(folder))
    assert 4 <= n_before < 16
    # A kill may cut the last line short.
    with (folder / "cells.jsonl").open("a") as file:
        file.write('{"fingerprint": "half')
    monkeypatch.setattr(TargetBench, "run", original)
    continued = run(study_file(), folder, cache)
    assert sorted(map(str, keys(continued))) == sorted(map(str, keys(whole)))
    all_rows = rows_of(folder)
    assert len({row["fingerprint"] for row in all_rows}) == len(all_rows)
    for row, other in zip(
        sorted(continued, key=lambda r: str(keys([r]))),
        sorted(whole, key=lambda r: str(keys([r]))),
        strict=True,
    ):
        assert row.get("test") == other.get("test")


def test_a_finished_study_measures_nothing_and_a_changed_setting_only_its_cells(
    study_file, tmp_path, cache, monkeypatch
):
    folder = tmp_path / "out"
    methods = ["none", "random", "expertsteer"]
    run(study_file(methods=methods), folder, cache)
    plans = []
    run(study_file(methods=methods), folder, cache, on_plan=lambda *plan: plans.append(plan))
    assert plans[-1] == (8, 0, 0.0)
    ridge = {"method": "expertsteer", "aligner": "ridge"}
    changed = [*methods[:2], ridge]
    rows = run(study_file(methods=changed), folder, cache, on_plan=lambda *p: plans.append(p))
    assert plans[-1][:2] == (8, 2)
    assert len(rows) == 8
    study, cells, _ = load_cells(folder)
    assert len(cells) == 8
    assert study.methods[2].aligner == "ridge"


def test_a_dry_run_only_plans(study_file, tmp_path, cache):
    plans = []
    run(study_file(), tmp_path / "out", cache, dry_run=True, on_plan=lambda *p: plans.append(p))
    assert plans[0][:2] == (16, 16)
    assert not (tmp_path / "out").exists()


def test_an_arm_that_cannot_be_had_costs_no_other(study_file, tmp_path, cache, monkeypatch):
    original = TargetBench.material

    def failing(self, arm, expert, pairs):
        if arm.name == "expertsteer":
            raise DataError("Got nothing to align.")
        return original(self, arm, expert, pairs)

    monkeypatch.setattr(TargetBench, "material", failing)
    path = study_file(methods=["none", "random", "expertsteer"])
    rows = run(path, tmp_path / "out", cache)
    failed = [row for row in rows if "error" in row]
    assert {row["method"] for row in failed} == {"expertsteer"}
    assert len(rows) == 8
    report = write_report(tmp_path / "out")[1].read_text()
    assert "| expertsteer " not in report
    assert "Missing: small, questions, expertsteer, large, 0: Got nothing to align." in report
    # Once the cause is mended, the next run has it.
    monkeypatch.setattr(TargetBench, "material", original)
    again = run(path, tmp_path / "out", cache)
    assert not [row for row in again if "error" in row]
    assert "| expertsteer " in write_report(tmp_path / "out")[1].read_text()


def test_only_one_run_at_a_time_in_a_folder(study_file, tmp_path, cache):
    from filelock import FileLock

    folder = tmp_path / "out"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(ExpertSteerError, match="another study"):
        run(study_file(), folder, cache)


def test_the_seconds_of_a_fit_do_not_count_reading(study_file, tmp_path, cache, monkeypatch):
    run(study_file(methods=["none", "random"]), tmp_path / "out", cache)
    events = []
    for name in ("collect_corpus", "seconds_of_work"):
        original = getattr(measuring, name)

        def noting(*args, name=name, original=original):
            events.append(name)
            return original(*args)

        monkeypatch.setattr(measuring, name, noting)
    # The layers were chosen in the first run: nothing has read states yet in the second.
    run(study_file(methods=["none", "random", "pca"]), tmp_path / "out", cache)
    assert events.count("collect_corpus") == 2
    clocks = [n for n, event in enumerate(events) if event == "seconds_of_work"]
    assert len(clocks) == 8  # of a benchmark: before and after the fit, the search and the test
    for first, last in ((0, 3), (4, 7)):
        assert "collect_corpus" not in events[clocks[first] : clocks[last]]


def test_validated_pairs_are_those_that_fit_chooses(study_file, models, tmp_path, cache):
    arm = {"method": "expertsteer", "strategy": "validated", "n_pairs": 2}
    path = study_file(methods=["none", arm], n_train=20)
    rows = run(path, tmp_path / "out", cache)
    study = load_study(path)
    for settings in study.benchmarks:
        (row,) = [r for r in rows if r["benchmark"] == settings.name and r["expert"]]
        examples = load_benchmark(study, settings, 0).fitting
        pack = ExpertSteer(n_pairs=2).fit(
            models["target"], models["expert"], examples, progress=False
        )
        chosen = [[pair.expert_layer, pair.target_layer] for pair in pack.pairs]
        assert row["pairs"] == chosen
        assert len(chosen) == 2


def test_ablations_differ_where_their_setting_does(study_file, files, tmp_path, cache):
    arms = [
        "none",
        {"method": "mean_difference", "name": "all"},
        {"method": "mean_difference", "name": "few", "n_train": 6},
        {"method": "mean_difference", "name": "noisy", "label_noise": 0.4},
        {"method": "mean_difference", "name": "two layers", "n_pairs": 2},
        {"method": "mean_difference", "name": "answers only", "positions": "generated"},
        {"method": "expertsteer", "name": "broad", "alignment_text": "both", "n_beginnings": 30},
        {"method": "mean_difference", "name": "first layer", "layer_depth": 0},
        {"method": "transferred", "name": "few sentences", "n_sentences": 10},
        {"method": "transferred", "name": "other text", "plain_text": files["texts"]},
        {"method": "expertsteer", "name": "itself", "expert": "target"},
        {"method": "expertsteer", "name": "lowest", "strategy": "lowest_mi"},
        {"method": "transferred", "name": "rotated", "aligner": "procrustes"},
        "transferred",
        "lora",
    ]
    rows = run(study_file(methods=arms, sweep="n_train"), tmp_path / "out", cache)
    found = {row["method"]: row for row in rows if row["benchmark"] == "texts" and row.get("pairs")}
    named = {arm if isinstance(arm, str) else arm["name"] for arm in arms}
    assert set(found) == named - {"none", "lora"}
    tuned = [row for row in rows if row["method"] == "lora"]
    plain = [row for row in rows if row["method"] == "none" and row["target"] == "small"]
    for row, before in zip(tuned, plain, strict=True):
        assert row["test"] != before["test"]
        assert row["seconds"]["fit"] > 0
        assert row["damage"] != 1
    assert len(found["two layers"]["pairs"]) == 2
    assert [target for _, target in found["first layer"]["pairs"]] == [0]
    assert found["itself"]["expert"] == "small"
    measured = [json.dumps(row["test"]) for row in found.values()]
    assert len(set(measured)) == len(measured)
    assert (tmp_path / "out" / "sweep.png") in write_report(tmp_path / "out")


def test_a_folder_without_a_study(tmp_path):
    with pytest.raises(DataError, match="expected a folder that a study has written"):
        write_report(tmp_path)


def test_words_after_neutral_prompts_are_an_effect(study_file, files, tmp_path, cache):
    words = {
        "prompts": [f"w{n} w{n + 1} w{n + 2}" for n in range(20, 30)],
        "positive_words": ["w1", "w3"],
        "negative_words": ["w0", "w2"],
        "plain_sentences": ["w1 w2 w3"],
    }
    path = tmp_path / "words.json"
    path.write_text(json.dumps(words))
    benchmarks = [{"name": "texts", "data": files["texts"], "words": str(path)}]
    methods = ["none", "mean_difference"]
    rows = run(study_file(benchmarks=benchmarks, methods=methods), tmp_path / "out", cache)
    found = {row["method"]: row for row in rows if row["target"] == "small"}
    # Half of the ten prompts choose, the other half are the figures.
    assert len(found["mean_difference"]["test"]["log_odds"]) == 5
    assert found["mean_difference"]["test"] != found["none"]["test"]
    write_report(tmp_path / "out")
    assert "mean_difference" in (tmp_path / "out" / "report.md").read_text()


def test_continuations_are_judged(study_file, files, tmp_path, cache, monkeypatch):
    words = {
        "prompts": [f"w{n} w{n + 1} w{n + 2}" for n in range(20, 30)],
        "positive_words": ["w1", "w3"],
        "negative_words": ["w0", "w2"],
        "plain_sentences": ["w1 w2 w3"],
    }
    path = tmp_path / "words.json"
    path.write_text(json.dumps(words))
    # The lexicon knows none of the tiny models' words, so it is given some.
    monkeypatch.setattr(VaderJudge, "score", lambda _, texts: [text.count("w1") for text in texts])
    benchmark = {"name": "texts", "data": files["texts"], "words": str(path), "judge": "vader"}
    settings = study_file(
        benchmarks=[benchmark | {"max_new_tokens": 12}], methods=["none", "mean_difference"]
    )
    rows = run(settings, tmp_path / "out", cache)
    found = {row["method"]: row["test"] for row in rows if row["target"] == "small"}
    for name in ("judged", "rep_4", "log_odds"):
        assert len(found["mean_difference"][name]) == 5
    assert found["mean_difference"]["judged"] != found["none"]["judged"]
    write_report(tmp_path / "out")
    header = next(
        line
        for line in (tmp_path / "out" / "report.md").read_text().splitlines()
        if "effect, nats" in line
    )
    assert "judged" in header
    assert "repeated" in header


def test_a_judge_of_the_same_texts_is_refused(study_file, files, tmp_path, cache, monkeypatch):
    judge = ClassifierJudge(load_examples(files["texts"]), None, None, 1.0, 0.5)
    monkeypatch.setattr("expertsteer.study.subjects.load_judge", lambda *_, **__: judge)
    benchmark = {"name": "t", "data": files["texts"], "words": "shipped", "judge": files["texts"]}
    with pytest.raises(DataError, match="trained on others"):
        run(study_file(benchmarks=[benchmark]), tmp_path / "out", cache)


def test_two_models_can_each_be_the_others_expert(study_file, models, tmp_path):
    both = [{"model": models[name], "name": name} for name in ("target", "expert")]
    path = study_file(targets=both, experts=both, methods=["rfm", "expertsteer", "transferred"])
    folder = tmp_path / "out"
    rows = run(path, folder, tmp_path / "fresh cache")
    pairs = {(r["target"], r["expert"]) for r in rows if r["method"] == "transferred"}
    assert pairs == {("target", "expert"), ("expert", "target")}
    assert not [row for row in rows if "error" in row]
    # Shares are drawn of an own effect that is clearly above 0, and none where there is no such.
    study, cells, _ = load_cells(folder)
    frame = cell_frame(study, cells)
    averages = average_frame(study, cells, frame)
    for low, is_drawn in ((0.1, True), (-0.1, False)):
        averages = averages.assign(effect_low=low, effect=low + 0.1, effect_high=low + 0.2)
        written = draw_figures(study, frame, averages, tmp_path)
        assert (tmp_path / "transfer.png" in written) == is_drawn


def test_a_sweep_names_every_targets_own_expert(study_file, models, tmp_path, monkeypatch):
    both = [{"model": models[name], "name": name} for name in ("target", "expert")]
    noisy = {"method": "expertsteer", "name": "noisy", "label_noise": 0.4}
    methods = ["none", "expertsteer", noisy]
    path = study_file(targets=both, experts=both, methods=methods, sweep="label_noise")
    run(path, tmp_path / "out", tmp_path / "fresh cache")
    drawn = {}
    monkeypatch.setattr(
        "expertsteer.study.figures.save_figure",
        lambda figure, path: drawn.setdefault(path.name, figure),
    )
    write_report(tmp_path / "out")
    legends = {
        axes.get_title(loc="left"): [text.get_text() for text in axes.get_legend().get_texts()]
        for axes in drawn["sweep.png"].axes
    }
    assert legends == {"target": ["expertsteer (expert)"], "expert": ["expertsteer (target)"]}


def test_a_report_shows_the_rows_of_the_settings_as_they_are_now(study_file, tmp_path, cache):
    folder = tmp_path / "out"
    methods = ["none", "random"]
    for budget in (1.2, 1.4, 1.2):
        rows = run(study_file(methods=methods, budget=budget), folder, cache)
        _, cells, _ = load_cells(folder)
        shown = {row["strength"] for row in cells if row["method"] == "random"}
        assert shown == {row["strength"] for row in rows if row["method"] == "random"}
    renamed = [{"method": "random", "name": "noise"}]
    run(study_file(methods=renamed, budget=1.2), folder, cache)
    _, cells, _ = load_cells(folder)
    assert {row["method"] for row in cells} == {"none", "noise"}


def test_several_seeds_are_averaged_by_item(study_file, tmp_path, cache):
    folder = tmp_path / "out"
    run(study_file(methods=["none", "random"], seeds=[0, 1]), folder, cache)
    study, cells, _ = load_cells(folder)
    (row,) = average_frame(study, cells, cell_frame(study, cells)).to_dict("records")
    assert row["n_benchmarks"] == 2
    effects = []
    for benchmark, field in (("questions", "log_odds"), ("texts", "preference")):
        by_item: dict[str, list[float]] = {}
        for seed in (0, 1):
            before, after = (
                next(
                    cell
                    for cell in cells
                    if (cell["target"], cell["benchmark"], cell["method"], cell["seed"])
                    == ("small", benchmark, method, seed)
                )
                for method in ("none", "random")
            )
            for item, a, b in zip(
                before["items"], after["test"][field], before["test"][field], strict=True
            ):
                by_item.setdefault(item, []).append(a - b)
        effects.append(np.mean([np.mean(values) for values in by_item.values()]))
    assert row["effect"] == pytest.approx(np.mean(effects))
    assert len(cell_frame(study, cells)) == 2 * 2 * 3


def test_a_cell_depends_on_no_other_arm(study_file, tmp_path, monkeypatch):
    # Texts that are read in other batches have states that differ in their last bits.
    one_by_one = partial(collect_states, batch_tokens=1)
    monkeypatch.setattr("expertsteer.study.subjects.collect_states", one_by_one)
    few = {"method": "transferred", "name": "few", "n_beginnings": 24}
    many = {"method": "transferred", "name": "many", "n_beginnings": 80}
    alone = run(study_file(methods=["none", few]), tmp_path / "alone", tmp_path / "first")
    beside = run(study_file(methods=["none", few, many]), tmp_path / "beside", tmp_path / "fresh")
    by_key = {keys([row])[0]: row for row in beside}
    for row in alone:
        other = by_key[keys([row])[0]]
        assert "error" not in row
        for field in ("fingerprint", "pairs", "test", "strongest"):
            assert row.get(field) == other.get(field)


def test_information_is_measured_on_what_the_arm_reads(study_file, tmp_path, cache, monkeypatch):
    sizes = []
    original = measuring.information_between

    def counting(expert_states, target_states, estimator):
        sizes.append(len(expert_states.values))
        return original(expert_states, target_states, estimator)

    monkeypatch.setattr(measuring, "information_between", counting)
    methods = [
        "none",
        {"method": "transferred", "name": "few", "n_beginnings": 24},
        {"method": "transferred", "name": "many", "n_beginnings": 80},
        {"method": "expertsteer", "name": "fewer labels", "n_train": 8},
        "expertsteer",
    ]
    texts = yaml.safe_load(study_file().read_text())["benchmarks"][1:]
    run(study_file(methods=methods, benchmarks=texts), tmp_path / "out", cache)
    # 8 and 16 train texts, and the 8 of the validation split.
    assert sizes == [24, 80, 16, 24]


def test_layers_are_chosen_with_the_labels_that_an_arm_has(study_file, tmp_path, cache):
    folder = tmp_path / "out"
    methods = [
        "none",
        "rfm",
        "mean_difference",
        {"method": "rfm", "name": "few", "n_train": 8},
        {"method": "rfm", "name": "noisy", "label_noise": 0.4},
    ]
    texts = yaml.safe_load(study_file().read_text())["benchmarks"][1:]
    run(study_file(methods=methods, benchmarks=texts), folder, cache)
    choices = [json.loads(line) for line in (folder / "layers.jsonl").open()]
    assert len({row["fingerprint"] for row in choices}) == len(choices) == 3
    effects = [tuple(found["effect"] for found in row["measured"]) for row in choices]
    assert len(set(effects)) == 3
    pairs = {row["method"]: row.get("pairs") for row in rows_of(folder)}
    ranked = {
        name: row["layers"][0] for name, row in zip(("rfm", "few", "noisy"), choices, strict=True)
    }
    assert {name: pairs[name][0][1] for name in ranked} == ranked


def test_what_is_cut_or_unfinished_is_counted(study_file, models, tmp_path, cache):
    long = {"question": " ".join(["w1"] * 90), "choices": ["w2", "w3"], "answer": 0}
    rows = [
        long | {"split": split, "id": f"{split} {n}", "answer": n % 2}
        for split in ("train", "validation", "test")
        for n in range(16)
    ]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "out"
    benchmarks = [{"name": "long", "data": str(path)}]
    with pytest.warns(UserWarning, match="longer than|tokens of"):
        run(study_file(benchmarks=benchmarks, methods=["none", "random"]), folder, cache)
    assert {row["n_cut"] for row in rows_of(folder)} == {12}
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "lost their beginning, by method: 12 of long (large), 12 of long (small)" in report


def test_a_report_says_what_is_not_measured_yet(study_file, tmp_path, cache, monkeypatch):
    folder = tmp_path / "out"
    original = TargetBench.run

    def halting(self, arm, *args):
        if self.benchmark.settings.name == "texts":
            raise KeyboardInterrupt
        return original(self, arm, *args)

    monkeypatch.setattr(TargetBench, "run", halting)
    with pytest.raises(KeyboardInterrupt):
        run(study_file(methods=["none", "random", "mean_difference"]), folder, cache)
    write_report(folder)
    assert "Not measured: 2 of `small`." in (folder / "report.md").read_text()


# The command line, but its third arm waits: a signal meets a study at work, however fast it is.
WAITING = """
import time
from expertsteer.cli.app import main
from expertsteer.study.measuring import TargetBench

original, at_once = TargetBench.run, iter(range(2))

def waiting(self, *args):
    if next(at_once, None) is None:
        time.sleep(600)
    return original(self, *args)

TargetBench.run = waiting
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_a_stopped_and_a_killed_process_go_on_with_no_row_twice(study_file, tmp_path, cache):
    methods = ["none", "random", "mean_difference", "pca", "probe"]
    path, folder = study_file(methods=methods), tmp_path / "out"
    command = [sys.executable, "-c", WAITING, "study", str(path), "--output", str(folder)]
    command += ["--cache-dir", str(tmp_path / "states")]
    for stop in (signal.SIGINT, signal.SIGKILL):
        n_before = len(rows_of(folder)) if folder.exists() else 0
        process = interruptible(command)
        try:
            while process.poll() is None:
                if (folder / "cells.jsonl").exists() and len(rows_of(folder)) > n_before:
                    process.send_signal(stop)
                    break
                time.sleep(0.05)
            _, shown = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        assert b"Traceback" not in shown
        assert n_before < len(rows_of(folder)) < 12
    rows = run(path, folder, cache)
    assert len(set(keys(rows))) == len(rows) == 12
    written = [row["fingerprint"] for row in rows_of(folder)]
    assert len(set(written)) == len(written) == 12


def test_every_machine_that_measured_something_is_named(study_file, tmp_path, cache, monkeypatch):
    folder = tmp_path / "out"

    def ran_on(methods, processor):
        machine = describe_machine() | {"processor": processor}
        monkeypatch.setattr("expertsteer.study.run.describe_machine", lambda: machine)
        run(study_file(methods=methods), folder, cache)
        ran = json.loads((folder / "study.json").read_text())["ran_on"]
        return [part["machine"]["processor"] for part in ran]

    assert ran_on(["none"], "one") == ["one"]
    assert ran_on(["none"], "two") == ["one"]
    assert ran_on(["none", "random"], "two") == ["one", "two"]
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert "Machine: one (" in report
    assert "Continued on: two (" in report


def test_what_one_answer_to_all_questions_gets_is_named(study_file, files, tmp_path, cache):
    rows = [json.loads(line) for line in Path(files["questions"]).read_text().splitlines()]
    for n, row in enumerate(row for row in rows if row["split"] == "test"):
        # In another order every other time: it is the answer that counts, not its place.
        row["choices"] = ["w1", "w2"][:: 1 if n % 2 else -1]
        row["answer"] = row["choices"].index("w2" if n % 4 else "w1")
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"questions": files["questions"], "texts": files["texts"], "two": str(path)}
    benchmarks = [{"name": name, "data": file} for name, file in data.items()]
    run(
        study_file(benchmarks=benchmarks, methods=["none", "random"], n_test=20),
        tmp_path / "out",
        cache,
    )
    write_report(tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "The same answer to every test question would be right in 75.0 % of two.\n" in report


def test_divergence_as_the_damage(study_file, tmp_path, cache):
    folder = tmp_path / "out"
    settings = {"damage": "divergence", "budget": 0.1, "methods": ["none", "random", "lora"]}
    rows = run(study_file(**settings), folder, cache)
    damage = {row["method"]: row["damage"] for row in rows if row["target"] == "small"}
    assert damage["none"] == 0
    assert damage["random"] > 0
    assert damage["lora"] > 0
    write_report(folder)


def test_texts_of_either_class_count_as_much(study_file, files, tmp_path, cache):
    skewed = [json.loads(line) for line in Path(files["texts"]).read_text().splitlines()]
    skewed = [row for n, row in enumerate(skewed) if row["label"] or n % 4 == 0]
    path = tmp_path / "skewed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in skewed))
    study = load_study(study_file(benchmarks=[{"name": "texts", "data": str(path)}]))
    benchmark = load_benchmark(study, study.benchmarks[0], seed=0)
    subject = Subject(tiny_language_model("llama"), benchmark)
    for task in (subject.validation[0], subject.test[0]):
        labels = [question.label for question in task.questions]
        assert labels
        assert sum(labels) == 0


def test_reported_damage_is_of_text_that_nothing_else_read(study_file, files, tmp_path):
    study = load_study(study_file(n_plain=20, n_beginnings=200))
    plain = PlainText.load(study)
    assert not set(plain.budget) & set(plain.test)
    beginnings = plain.beginnings[PlainSource(None, None)]
    assert not [b for b in beginnings if any(t.startswith(b) for t in plain.test)]
    with pytest.raises(DataError, match="expected 120 or more"):
        PlainText.load(load_study(study_file(n_plain=60)))


def test_shares_of_the_strength_are_drawn_over_the_damage_they_do(
    study_file, tmp_path, monkeypatch
):
    shares = [
        {"method": method, "name": f"{method}, {share}", "strength_shares": [share]}
        for method in ("random", "expertsteer")
        for share in (0.5, 1.0)
    ]
    settings = {"strength_shares": [1.0], "sweep": "strength_shares"}
    # No number stands beside what does not steer.
    settings["methods"] = ["none", "prompt", *shares]
    rows = run(study_file(**settings), tmp_path / "out", tmp_path / "fresh cache")
    drawn = {}
    monkeypatch.setattr(
        "expertsteer.study.figures.save_figure",
        lambda figure, path: drawn.setdefault(path.name, figure),
    )
    write_report(tmp_path / "out")
    (axes, *_) = drawn["sweep.png"].axes
    target = axes.get_title(loc="left")
    lines = {c.get_label().split(" (")[0]: c.lines[0] for c in axes.containers}
    assert set(lines) == {"random", "expertsteer", "prompt"}
    del lines["prompt"]
    # Averages are of what every method was measured on, and an instruction needs questions.
    own = [row for row in rows if row["target"] == target and row["benchmark"] == "questions"]
    for method, line in lines.items():
        damages = [
            [row["damage"] for row in own if row["method"] == f"{method}, {share}"]
            for share in (0.5, 1.0)
        ]
        assert line.get_xdata() == pytest.approx([geometric_mean(d) for d in damages])
    assert sorted(text.get_text() for text in axes.texts) == ["0.5", "0.5", "1", "1"]


def test_open_answers_are_asked_of_the_questions_that_are_also_choices(study_file, tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [
        {
            "question": f"what is {n} and {n} ?",
            "answer": str(2 * n),
            "split": ("train", "validation", "test")[n % 3],
            "id": f"sum {n}",
        }
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = {"name": "sums", "data": str(path), "open": True, "n_shots": 2, "max_new_tokens": 4}
    study = load_study(study_file(benchmarks=[sums | {"domain": "general"}]))
    subject = Subject(
        tiny_language_model("llama"), load_benchmark(study, study.benchmarks[0], seed=0)
    )
    choices, words = subject.test
    assert len(words.questions) == len(choices.questions) == study.n_test
    for choice, asked in zip(choices.questions, words.questions, strict=True):
        assert asked.name == choice.name
        assert asked.prompt.endswith(choice.prompt.rstrip())
        assert asked.prompt.count("Question:") == 3
        n = int(choice.prompt.split()[3])
        assert asked.answer == str(2 * n)
    (measured,) = run(
        study_file(benchmarks=[sums | {"domain": "general"}], methods=["none"], experts=[]),
        tmp_path / "out",
        tmp_path / "fresh cache",
    )
    assert len(measured["test"]["exact_match"]) == len(choices.questions)
