"""Blocks below a steered one are read once, and nothing else changes."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from expertsteer.data import RenderedText
from expertsteer.evaluation.lower_blocks import LowerBlocks
from expertsteer.evaluation.scoring import Request, continuation_log_likelihoods, token_divergences
from expertsteer.evaluation.scoring import token_log_likelihoods as read
from expertsteer.steering import Steering
from helpers import FAMILIES, WIDTH, tiny_language_model

TEXTS = [RenderedText(text, 0, False) for text in ("w1 w2 w3", "w4 w5 w6 w7 w8", "w9 w1 w2")]


def steering(model, layer: int = 1, seed: int = 0) -> Steering:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return Steering(model.model, {layer: vector})


def counted(model) -> list[int]:
    """Blocks whose own forward runs, in the order they do."""
    ran: list[int] = []
    for place, block in enumerate(model.blocks):
        part = next(module for module in block.modules() if module is not block)
        part.register_forward_pre_hook(lambda *_, p=place: ran.append(p))
    return ran


def without_and_with(lower, steered, measure):
    """What is measured under a steering, read whole and with remembered blocks skipped."""
    with steered:
        expected = measure()
    with lower.skipped(steered), steered:
        return expected, measure()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_as_without(family):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    for layer in (2, 1, 0):
        for seed in range(3):
            expected, found = without_and_with(
                lower, steering(model, layer, seed), lambda: read(model, TEXTS)
            )
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
    plain = read(model, TEXTS)
    assert not torch.equal(torch.cat(plain), torch.cat(expected))


def test_only_the_blocks_above_run_again():
    model = tiny_language_model("llama")
    ran = counted(model)
    lower = LowerBlocks(model)
    for _ in range(3):
        steered = steering(model)
        with lower.skipped(steered), steered:
            read(model, TEXTS[:1])
    assert ran == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unsteered_pass_serves_every_layer(family):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    with lower.remembered([0, 2]):
        plain = read(model, TEXTS)
    for one, other in zip(plain, read(model, TEXTS), strict=True):
        assert torch.equal(one, other)
    for layer in (0, 2):
        with steering(model, layer):
            expected = read(model, TEXTS)
        ran = counted(model)
        steered = steering(model, layer)
        with lower.skipped(steered), steered:
            found = read(model, TEXTS)
        assert min(ran, default=layer + 1) == layer + 1
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_other_texts_are_not_mistaken_for_those_remembered():
    model = tiny_language_model("llama")
    lower = LowerBlocks(model)
    for texts in (TEXTS[:1], TEXTS[1:2], TEXTS, TEXTS[2:]):
        steered = steering(model)
        expected, found = without_and_with(lower, steered, lambda texts=texts: read(model, texts))
        assert torch.equal(torch.cat(found), torch.cat(expected))


def test_divergences_are_as_without():
    model = tiny_language_model("gemma3_text")
    lower = LowerBlocks(model)
    expected = token_divergences(model, TEXTS, steering(model))
    for _ in range(2):
        with lower.skipped(steering(model)):
            found = token_divergences(model, TEXTS, steering(model))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.divergence, other.divergence)


# More tokens than the sliding windows of the families that have them.
REQUESTS = [
    Request((7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18), ((11, 12), (13, 14, 15))),
    Request((9, 8, 7), ((11,), (12, 13, 14, 15))),
]
# Its cache keeps more than keys and values.
RUN_WHOLE = ("lfm2",)


def scores(model, requests):
    return continuation_log_likelihoods(model, requests, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_of_a_cached_context_are_as_without(family):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    for layer in (2, 1, 0):
        for seed in range(2):
            steered = steering(model, layer, seed)
            with steered:
                expected = scores(model, REQUESTS)
            ran = counted(model)
            with lower.skipped(steered), steered:
                assert scores(model, REQUESTS) == expected
            skips = seed == 1 and family not in RUN_WHOLE
            assert min(ran, default=layer + 1) == (layer + 1 if skips else 0)
    assert scores(model, REQUESTS) != expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_continuations_are_as_without_wherever_is_steered(family, positions):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    for seed in range(2):
        vector = steering(model, 1, seed).vectors
        steered = Steering(model.model, vector, positions=positions)
        expected, found = without_and_with(lower, steered, lambda: scores(model, REQUESTS))
        assert found == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_one_continuation_of_two_contexts_is_not_mistaken(family):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    # What a sliding window still sees is the same in both.
    seen = tuple(range(20, 32))
    for first in (7, 8):
        requests = [Request((first, *seen), ((11, 12, 13),))]
        expected, found = without_and_with(
            lower, steering(model, 2), lambda asked=requests: scores(model, asked)
        )
        assert found == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2"])
def test_generated_texts_are_as_without_and_not_remembered(family):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    ids = torch.arange(5, 17).reshape(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False}
    for seed in range(3):
        expected, found = without_and_with(
            lower, steering(model, 1, seed), lambda: model.model.generate(ids, **options)
        )
        assert torch.equal(found, expected)
    assert len(lower._remembered) == (family != "lfm2")


def test_states_that_blocks_share_are_computed_anew():
    config = Gemma3nTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=8,
        laurel_rank=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        activation_sparsity_pattern=[0.0] * 4,
    )
    torch.manual_seed(0)
    inner = Gemma3nForCausalLM(config).eval()
    model = dataclasses.replace(tiny_language_model("llama"), model=inner)
    ids = torch.arange(3, 12)[None]
    expected = inner(input_ids=ids, use_cache=False).logits
    lower = LowerBlocks(model)
    for _ in range(2):
        with lower.remembered([1]):
            found = inner(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, expected)


def test_seconds_are_counted_when_they_are_skipped():
    model = tiny_language_model("llama")
    lower = LowerBlocks(model)
    steered = steering(model)
    counts = []
    for _ in range(3):
        with lower.skipped(steered), steered:
            read(model, TEXTS)
        counts.append(lower.seconds_skipped)
    assert 0 == counts[0] < counts[1]
    assert counts[2] == pytest.approx(2 * counts[1])


def test_what_is_no_steering_skips_nothing():
    model = tiny_language_model("llama")
    ran = counted(model)
    lower = LowerBlocks(model)
    for _ in range(2):
        with lower.skipped(nullcontext()):
            read(model, TEXTS[:1])
    assert ran == [0, 1, 2] * 2


def test_the_model_is_left_as_it_was():
    model = tiny_language_model("llama")
    before = read(model, TEXTS)
    lower = LowerBlocks(model)
    steered = steering(model, 1)
    with lower.skipped(steered), steered:
        read(model, TEXTS)
    assert not any("forward" in vars(block) for block in model.blocks)
    assert torch.equal(torch.cat(read(model, TEXTS)), torch.cat(before))
