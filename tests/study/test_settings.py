"""A study file's mistakes name the field and what it may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertsteer.alignment import AutoEncoder
from expertsteer.errors import ParameterError
from expertsteer.study import load_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").rglob("*.yaml"))


def test_what_a_file_says_is_what_is_run(study_file):
    study = load_study(study_file())
    assert study.name == "study"
    assert [model.name for model in study.targets] == ["small"]
    paper = next(arm for arm in study.methods if arm.method == "expertsteer_paper")
    aligner = paper.steer(seed=3).aligner
    assert isinstance(aligner, AutoEncoder)
    assert (aligner.solver, aligner.n_steps, aligner.random_state) == ("gradient", 20, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgett": 1.1}, "unknown field budgett.*budget"),
        ({"methods": ["none", "rmf"]}, r"methods\.1\.method='rmf'.*mean_difference.*lora|'rmf'"),
        ({"methods": [{"method": "rfm", "strategie": "x"}]}, "strategie.*strategy"),
        ({"methods": ["rfm", "rfm"]}, "'rfm' twice"),
        (
            {"methods": [{"method": "expertsteer", "aligner_options": {"wait": 1}}]},
            "'wait'.*weight",
        ),
        ({"methods": [{"method": "expertsteer", "expert": "huge"}]}, "'huge'.*large"),
        ({"methods": [{"method": "rfm", "strategy": "explicit"}]}, "strategy.*no use of"),
        ({"methods": [{"method": "expertsteer", "strategy": "explicit"}]}, "pairs"),
        ({"methods": [{"method": "transferred", "strategy": "validated"}]}, "all of the examples"),
        ({"methods": [{"method": "expertsteer", "n_pairs": 9}]}, "n_pairs=9.*layer_depths"),
        ({"methods": [{"method": "rfm", "layer_depth": 1.5}]}, "layer_depth=1.5"),
        ({"methods": [{"method": "rfm", "layer_depth": 0, "n_pairs": 2}]}, "one pair only"),
        ({"methods": [{"method": "rfm", "plain_text": "a.txt"}]}, "got plain_text, which"),
        ({"methods": [{"method": "rfm", "n_train": 99}]}, "n_train=99.*draws 16"),
        ({"strength_shares": []}, "strength_shares"),
        ({"budget": float("inf")}, "budget"),
        ({"methods": [{"method": "rfm", "label_noise": 0.9}]}, "label_noise"),
        ({"benchmarks": [{"name": "q", "kind": "questions"}]}, "kind.*multiple_choice"),
        ({"experts": []}, "experts.*needs one"),
        ({"budget": 0.9}, "budget.*more than 1"),
        ({"damage": "loss"}, "damage.*perplexity"),
        ({"n_train": 2}, "got n_train=2, but expected a number of at least"),
        (
            {"strength_shares": [1.5]},
            r"strength_shares\.0=1\.5, but expected a number of at most 1",
        ),
        ({"instructions": {}}, "instructions.*general"),
        ({"targets": []}, "targets"),
        ({"sweep": "strength_shares"}, "sweep.*several shares for 'random'.*every method one"),
        ({"sweep": "strength"}, "sweep='strength'.*expected one of n_train.*strength_shares"),
        ({"reference": "rmf"}, "reference.*'rmf'.*expected one of none, random"),
    ],
)
def test_a_mistake_names_its_field(study_file, changes, message):
    with pytest.raises(ParameterError, match=message) as caught:
        load_study(study_file(**changes))
    assert "study.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_load(path):
    study = load_study(path)
    assert study.name == path.stem


def test_a_file_that_is_no_study(tmp_path):
    with pytest.raises(ParameterError, match="No such file"):
        load_study(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ParameterError, match="mapping"):
        load_study(path)
    path.write_text("a: [b")
    with pytest.raises(ParameterError, match="not valid YAML"):
        load_study(path)
