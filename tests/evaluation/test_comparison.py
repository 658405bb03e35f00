"""The comparison's rows on tiny models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from expertsteer.alignment import AutoEncoder
from expertsteer.cli.compare import MethodName
from expertsteer.comparison import compare
from expertsteer.data import EffectWords
from expertsteer.directions import PrincipalComponent
from expertsteer.errors import PackError, ParameterError
from expertsteer.methods import METHODS, shuffled_labels
from expertsteer.pipeline import ExpertSteer
from helpers import tiny_language_model
from test_pipeline import labelled, plain

WORDS = EffectWords(
    prompts=[f"w{n} w{n + 1}" for n in range(20, 32)],
    positive_words=["w1", "w2"],
    negative_words=["w9", "w10"],
    plain_sentences=["w40 w41 w42 w43", "w50 w51 w52"],
    generation_prompts=["w1"],
)


@pytest.fixture
def quick_paper(monkeypatch):
    quick = AutoEncoder(solver="gradient", n_steps=30)
    original = ExpertSteer.paper.__func__

    def paper(cls, **settings):
        return dataclasses.replace(original(cls, **settings), aligner=quick)

    monkeypatch.setattr(ExpertSteer, "paper", classmethod(paper))


def test_rows(quick_paper):
    target, expert = tiny_language_model("gpt2"), tiny_language_model("llama")
    steer = ExpertSteer(strategy="explicit", pairs=((1, 1),), strength=0.3)
    pack = steer.fit(target, expert, labelled(), progress=False)
    comparison = compare(
        target,
        expert,
        labelled(),
        WORDS,
        pack=pack,
        steer=steer,
        plain_text=plain(),
        seeds=(0, 1),
        progress=False,
    )
    names = [row.method for row in comparison.rows]
    assert names == [
        "unsteered",
        "random vector",
        "target RFM, shuffled labels",
        "target mean difference (CAA)",
        "target RFM",
        "paper's auto-encoder, seed 0",
        "paper's auto-encoder, seed 1",
        "ExpertSteer",
        "transferred, plain text only",
    ]
    rows = dict(zip(names, comparison.rows, strict=True))
    assert rows["unsteered"].effect == 0
    assert rows["target mean difference (CAA)"].cosine == pytest.approx(1, abs=1e-4)
    for row in comparison.rows[1:]:
        low, high = row.effect_interval
        assert low <= row.effect <= high
        assert row.effect != 0
        assert row.perplexity > 1
    assert comparison.strength == 0.3
    assert comparison.to_dict()["n_prompts"] == 12


def test_labels_are_shuffled_within_splits():
    examples = labelled()
    labels = shuffled_labels(examples, 0)
    assert (labels != examples.labels).any()
    for split in ("train", "validation", "test"):
        rows = np.array(examples.splits) == split
        assert sorted(labels[rows]) == sorted(examples.labels[rows])


def test_every_method_of_the_command_line_can_be_named(quick_paper):
    assert [name.value for name in MethodName] == list(METHODS)
    target, expert = tiny_language_model("gpt2"), tiny_language_model("llama")
    steer = ExpertSteer(strategy="explicit", pairs=((1, 1),), strength=0.3)
    pack = steer.fit(target, expert, labelled(), progress=False)
    settings = {"pack": pack, "steer": steer, "progress": False}
    few = compare(
        target, expert, labelled(), WORDS, methods=["pca", "probe", "expertsteer"], **settings
    )
    assert [row.method for row in few.rows[1:]] == [
        METHODS[name].label for name in ("pca", "probe", "expertsteer")
    ]
    # What finds the expert's direction has no part in the rows that are called RFM.
    other = dataclasses.replace(steer, direction=PrincipalComponent())
    rows = [
        compare(
            target,
            expert,
            labelled(),
            WORDS,
            methods=["pca", "rfm"],
            **(settings | {"steer": chosen}),
        ).rows[1:]
        for chosen in (steer, other)
    ]
    assert rows[0] == rows[1]
    assert rows[0][0].cosine != pytest.approx(rows[0][1].cosine)
    settings["pack"] = dataclasses.replace(pack, strength=0.0)
    for strength in (0.0, None):
        with pytest.raises(ParameterError, match=r"strength"):
            compare(target, expert, labelled(), WORDS, strength=strength, **settings)
    settings["pack"] = dataclasses.replace(pack, pairs=())
    with pytest.raises(PackError, match=r"layer pairs none, but expected a pair"):
        compare(target, expert, labelled(), WORDS, **settings)
    settings["pack"] = pack
    with pytest.raises(ParameterError, match=r"method='magic'.*pca"):
        compare(target, expert, labelled(), WORDS, methods=["magic"], **settings)
    with pytest.raises(ParameterError, match="plain text"):
        compare(target, expert, labelled(), WORDS, methods=["transferred"], **settings)
