"""Effect, perplexity and preference against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertsteer.data import EffectWords, LabelledExamples, RenderedText
from expertsteer.errors import DataError
from expertsteer.evaluation import (
    choose_by_preference,
    perplexity,
    preference_gap,
    word_log_odds,
)
from expertsteer.evaluation.lower_blocks import LowerBlocks
from expertsteer.evaluation.scoring import mean_log_likelihoods, token_log_likelihoods
from expertsteer.models import batches
from helpers import pack_for, tiny_language_model

FAMILIES = ("llama", "gpt2", "opt")
TEXTS = ["w1 w2 w3", "w9 w8", "w5 w6 w7 w8 w9 w10 w11"]


def by_hand(model, text):
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        scores = model.model(ids).logits[0].log_softmax(-1)
    return scores, ids[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_of_a_batch_are_those_of_each_text_alone(family):
    model = tiny_language_model(family)
    found = token_log_likelihoods(model, [RenderedText(text, 0, False) for text in TEXTS])
    for text, values in zip(TEXTS, found, strict=True):
        scores, ids = by_hand(model, text)
        expected = scores[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


def test_perplexity_is_over_all_tokens():
    model = tiny_language_model("llama")
    total, count = 0.0, 0
    for text in TEXTS:
        scores, ids = by_hand(model, text)
        total += float(scores[:-1].gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    assert perplexity(model, TEXTS) == pytest.approx(np.exp(-total / count), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_word_log_odds(family):
    model = tiny_language_model(family)
    words = EffectWords(TEXTS, ["w1", "w2"], ["w3"], ["w1"], ["w1"])
    odds = word_log_odds(model, words)
    for text, value in zip(TEXTS, odds, strict=True):
        scores, _ = by_hand(model, text)
        ids = model.tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"])
        last = scores[-1, ids]
        expected = last[:2].logsumexp(0) - last[2]
        assert float(value) == pytest.approx(float(expected), abs=1e-5)


def test_words_of_several_tokens_do_not_count():
    model = tiny_language_model("llama")
    both = EffectWords(TEXTS, ["w1", "w2 w3"], ["w4", "w4 w5"], ["w1"], ["w1"])
    one = EffectWords(TEXTS, ["w1"], ["w4"], ["w1"], ["w1"])
    assert torch.equal(word_log_odds(model, both), word_log_odds(model, one))
    none = EffectWords(TEXTS, ["w2 w3"], ["w4"], ["w1"], ["w1"])
    with pytest.raises(DataError, match="1 positive words of which none is a single token"):
        word_log_odds(model, none)


def test_layers_are_chosen_batch_by_batch_as_on_all_texts(monkeypatch):
    model = tiny_language_model("llama")
    n = 12
    texts = tuple(" ".join(f"w{7 * row + k}" for k in range(2 + row % 5)) for row in range(n))
    examples = LabelledExamples(
        ("",) * n, texts, np.tile(np.array([1, -1], np.int8), n // 2), ("validation",) * n, texts
    )
    pack = pack_for(model, layers=(0, 1, 2))
    unsteered = preference_gap(model, examples, False)
    expected = {}
    for layer in pack.layers:
        with pack.restrict([layer]).apply(model):
            expected[str(layer)] = preference_gap(model, examples, False) - unsteered
    most = []
    original = LowerBlocks.remembered
    monkeypatch.setattr(batches, "HEAD_POSITIONS", 9)
    monkeypatch.setattr(
        LowerBlocks,
        "remembered",
        lambda self, layers: most.append(layers) or original(self, layers),
    )
    chosen = choose_by_preference(pack, model, examples, 2)
    assert chosen.provenance["validated"] == pytest.approx(expected, abs=1e-5)
    best = sorted(expected, key=lambda layer: -expected[layer])[:2]
    assert chosen.layers == tuple(sorted(map(int, best)))
    assert len(most) > 3


def test_preference_gap_is_the_difference_of_class_means():
    model = tiny_language_model("llama")
    examples = LabelledExamples(
        ("",) * 3, tuple(TEXTS), np.array([1, -1, 1], dtype=np.int8), ("train",) * 3, tuple("abc")
    )
    scores = mean_log_likelihoods(model, [RenderedText(text, 0, False) for text in TEXTS])
    expected = (scores[0] + scores[2]) / 2 - scores[1]
    assert preference_gap(model, examples, False) == pytest.approx(float(expected), abs=1e-6)
