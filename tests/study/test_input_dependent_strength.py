"""Choosing by the expert's score which prompts are steered, from a finished study."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from expertsteer.cli import show
from expertsteer.study.run import run_study
from expertsteer.study.settings import load_study
from helpers import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "studies/input_dependent_strength.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture
def run(script, monkeypatch, capsys):
    def runner(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        monkeypatch.setattr(show.answer, "width", 200)
        with pytest.raises(SystemExit) as ended:
            script.main()
        return ended.value.code, *capsys.readouterr()

    return runner


def test_a_score_that_knows_what_steering_helps_gains(script):
    change = np.array([1.0, -1.0] * 10)
    knowing = script.chosen_effect(change, -change)
    assert knowing["share"] == 0.5
    assert knowing["everywhere"] == 0
    assert knowing["chosen"] == knowing["gain"] == 0.5
    assert knowing["gain_interval"][0] > 0
    assert knowing["spearman"] == -1
    misled = script.chosen_effect(change, change)
    assert misled["gain"] == -0.5


@pytest.mark.parametrize(("score", "share"), [(1.0, 0.0), (-1.0, 1.0)])
def test_all_or_none_gains_nothing(script, score, share):
    found = script.chosen_effect(np.array([1.0, 2.0, -1.0, 0.5]), np.full(4, score))
    assert (found["share"], found["gain"], found["spearman"]) == (share, 0, None)
    assert found["chosen"] == pytest.approx(share * found["everywhere"])


def test_a_finished_study_is_read(run, study_file, tmp_path):
    study = load_study(study_file())
    cache = tmp_path / "cache"
    run_study(study, tmp_path / "done", cache_dir=cache, progress=False)
    known = set(cache.iterdir())
    code, out, err = run(
        tmp_path / "done", "--output", tmp_path / "found.json", "--cache-dir", cache
    )
    assert code == 0, err
    assert len(set(cache.iterdir()) - known) == 1  # the prompts; the examples were there
    assert "questions" in out
    found = json.loads((tmp_path / "found.json").read_text())
    # Labelled texts have no prompts to be read.
    assert [row["benchmark"] for row in found["rows"]] == ["questions"]
    row = found["rows"][0]
    assert row["n_items"] == study.n_test
    assert 0 <= row["share"] <= 1
    assert row["gain"] == pytest.approx(row["chosen"] - row["share"] * row["everywhere"], abs=1e-4)


def test_mistakes_are_one_line(run, study_file, tmp_path, monkeypatch):
    code, _, err = run(tmp_path, "--output", "x.json")
    assert code == 1
    assert "but expected a folder that a study has written" in err
    study = load_study(study_file())
    run_study(study, tmp_path / "done", cache_dir=tmp_path / "cache", dry_run=True, progress=False)
    code, _, err = run(tmp_path / "done", "--output", "x.json")
    assert code == 1
    assert "expected a folder" in err
    run_study(study, tmp_path / "done", cache_dir=tmp_path / "cache", progress=False)
    code, _, err = run(tmp_path / "done", "--output", "x.json", "--method", "rfm")
    assert code == 1
    assert "Got --method 'rfm'" in err
    assert err.count("\n") == 1
    code, _, err = run(tmp_path / "done", "--output", "x.json", "--expert", "nobody")
    assert code == 1
    assert "Got --expert 'nobody', but expected one of the study's: large" in err
    assert err.count("\n") == 1
    code, _, err = run(tmp_path / "done")
    assert code == 2
    assert err.startswith("error: Missing option '--output'")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(tmp_path / "done", "--output", "x.json")
    assert code == 1
    assert "Got no package pandas" in err
