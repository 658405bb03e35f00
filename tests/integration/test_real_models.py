"""The method on the two embedded real models, end to end."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertsteer import ExpertSteer, SteeringPack, load_model
from expertsteer.comparison import compare
from expertsteer.data import (
    EffectWords,
    load_examples,
    load_plain_text,
    render,
    sentence_beginnings,
    shipped_file,
)
from expertsteer.evaluation import word_log_odds
from expertsteer.generation import generate_side_by_side
from expertsteer.pipeline import fit_alignment, fit_directions
from expertsteer.states import collect_states
from expertsteer.steering import Steering

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("real models")]

PAIR = (18, 12)


@pytest.fixture(scope="module")
def target():
    return load_model("gemma-3-270m")


@pytest.fixture(scope="module")
def expert():
    return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def examples():
    return load_examples(shipped_file("sentiment.jsonl"))


@pytest.fixture(scope="module")
def words():
    return EffectWords.load(shipped_file("sentiment_effect.json"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def pack(target, expert, examples, cache):
    steer = ExpertSteer(strategy="explicit", pairs=(PAIR,))
    return steer.fit(target, expert, examples, cache_dir=cache, progress=False)


@pytest.mark.parametrize("name", ["target", "expert"])
def test_states_are_the_residual_stream(name, request):
    model = request.getfixturevalue(name)
    texts = ["The train was late again.", "Rivers run to the sea, and the sea is never full."]
    states = collect_states(model, texts, batch_tokens=1, progress=False)
    for row, text in enumerate(texts):
        inputs = model.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            hidden = model.model(**inputs, output_hidden_states=True).hidden_states
        for layer in range(len(model.blocks) - 1):
            torch.testing.assert_close(
                states.layer(layer)[row], hidden[layer + 1][0, -1], rtol=1e-3, atol=1e-2
            )
        # The last entry of hidden_states has been through the final norm; ours has not.
        last = states.layer(len(model.blocks) - 1)[row]
        assert not torch.allclose(last, hidden[-1][0, -1], rtol=0.1)


@pytest.mark.parametrize("name", ["target", "expert"])
def test_a_zero_vector_changes_no_bit(name, request):
    model = request.getfixturevalue(name)
    inputs = model.tokenizer("The capital of France is", return_tensors="pt")
    width = model.description.width
    with torch.inference_mode():
        before = model.model(**inputs).logits
        with Steering(model.model, {3: torch.zeros(width)}):
            during = model.model(**inputs).logits
    assert torch.equal(before, during)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_generation_does_not_depend_on_cache_or_padding(target, pack, positions):
    prompts = ["The weather today", "My sister told me last night that the new neighbours"]
    texts = {}
    for use_cache in (True, False):
        inputs = target.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with pack.apply(target, 0.05, positions):
            output = target.generate(
                **inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache
            )
        texts[use_cache] = target.tokenizer.batch_decode(output, skip_special_tokens=True)
    assert texts[True] == texts[False]
    for prompt, text in zip(prompts, texts[True], strict=True):
        alone = generate_side_by_side(
            target, [pack], [prompt], [0.05], positions=positions, max_new_tokens=8, progress=False
        )
        assert text == prompt + alone[0].continuations[0.05]


def test_steering_shows_and_reverses(target, pack, words):
    few = dataclasses.replace(words, prompts=words.prompts[:12])
    unsteered = word_log_odds(target, few).mean()
    with pack.apply(target, 0.1):
        up = word_log_odds(target, few).mean()
    with pack.apply(target, -0.1):
        down = word_log_odds(target, few).mean()
    with pack.apply(target, 0.1), (-pack).apply(target, 0.1):
        both = word_log_odds(target, few).mean()
    assert up - unsteered > 2
    assert down - unsteered < -2
    assert abs(both - unsteered) < 0.05
    assert torch.equal(word_log_odds(target, few).mean(), unsteered)


def test_the_comparison_holds(target, expert, examples, words, pack, cache):
    comparison = compare(
        target,
        expert,
        examples,
        dataclasses.replace(
            words, prompts=words.prompts[:20], plain_sentences=words.plain_sentences[:20]
        ),
        pack=pack,
        methods=["random", "mean_difference", "rfm", "expertsteer"],
        seeds=(0,),
        cache_dir=cache,
        progress=False,
    )
    rows = {row.method: row for row in comparison.rows}
    own = rows["target RFM"]
    aligned = rows["ExpertSteer"]
    random = rows["random vector"]
    assert aligned.effect >= 0.8 * own.effect > 0
    assert aligned.perplexity <= 1.5 * own.perplexity
    assert aligned.effect_interval[0] > max(random.effect_interval[1], 0)
    assert abs(random.cosine) < 0.2
    assert aligned.cosine > 0.6
    assert rows["target mean difference (CAA)"].cosine == pytest.approx(1, abs=1e-4)


def test_a_vector_of_the_expert_is_carried_over_on_plain_text(
    target, expert, examples, words, tmp_path
):
    texts = sentence_beginnings(load_plain_text(), 600)
    alignment = fit_alignment(target, expert, texts, pairs=[PAIR], progress=False)
    saved = type(alignment).load(alignment.save(tmp_path / "a-to-b"))
    fitting = examples.for_fitting()
    states = collect_states(
        expert, render(fitting, expert.tokenizer), layers=[PAIR[0]], progress=False
    )
    layers = states.layer(PAIR[0])[:, None]
    ((finder, _),) = fit_directions(ExpertSteer().direction, layers, fitting)
    pack = saved.transfer(finder.direction_, expert_layer=PAIR[0])
    assert pack.layers == (PAIR[1],)
    few = dataclasses.replace(words, prompts=words.prompts[:12])
    unsteered = word_log_odds(target, few).mean()
    with SteeringPack.load(pack.save(tmp_path / "carried"), target).apply(target, 0.1):
        assert word_log_odds(target, few).mean() - unsteered > 1


def test_a_pack_is_refused_by_another_model(pack, expert):
    from expertsteer.errors import PackError

    with pytest.raises(PackError, match="30 blocks instead of 18, width 576 instead of 640"):
        pack.apply(expert)
