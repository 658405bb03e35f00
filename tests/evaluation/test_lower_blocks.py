"""Blocks below a steered one are read once, and nothing else changes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_as_without(family):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    for layer in (2, 1, 0):
        for seed in range(3):
            with steering(model, layer, seed):
                expected = read(model, TEXTS)
            found_with = steering(model, layer, seed)
            with lower.skipped(found_with), found_with:
                found = read(model, TEXTS)
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
        with lower.skipped(steered), steered:
            found = read(model, texts)
        with steering(model):
            expected = read(model, texts)
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


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba"])
def test_passes_with_a_cache_run_whole(family):
    model = tiny_language_model(family)
    lower = LowerBlocks(model)
    requests = [Request((7, 8, 9, 10), ((11, 12), (13, 14, 15)))]
    with steering(model):
        expected = continuation_log_likelihoods(model, requests, progress=False)
    for _ in range(2):
        steered = steering(model)
        with lower.skipped(steered), steered:
            assert continuation_log_likelihoods(model, requests, progress=False) == expected


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
