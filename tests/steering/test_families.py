"""What every family must do: the same on each, whatever its blocks look like."""

from __future__ import annotations

import pytest
import torch

from expertsteer.models import find_blocks
from expertsteer.states import collect_states
from expertsteer.steering import STEERED_POSITIONS, Steering
from helpers import (
    FAMILIES,
    N_LAYERS,
    RECURRENT,
    WIDTH,
    BlockOutputs,
    random_ids,
    random_vector,
    tiny_language_model,
    tiny_model,
)

LAYER = 1

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def _run(model, ids, **options):
    """Return all blocks' outputs and the logits of one pass."""
    with BlockOutputs(find_blocks(model)) as seen, torch.no_grad():
        logits = model(ids, **options).logits
    return seen.passes[0], logits


def test_zero_vector_changes_no_bit(family):
    model, ids = tiny_model(family), random_ids(3, 9)
    _, plain = _run(model, ids)
    zero = torch.zeros(WIDTH)
    for positions in STEERED_POSITIONS:
        with Steering(model, dict.fromkeys(range(N_LAYERS), zero), positions):
            assert torch.equal(_run(model, ids)[1], plain)


def test_vector_shifts_that_block_and_none_before(family):
    model, ids, vector = tiny_model(family), random_ids(3, 9), random_vector()
    before, plain = _run(model, ids)
    with Steering(model, {LAYER: vector}):
        after, steered = _run(model, ids)
    assert torch.equal(after[0], before[0])
    # All rows of the batch, not only the first one.
    assert torch.equal(after[LAYER], before[LAYER] + vector)
    assert not torch.allclose(after[LAYER + 1], before[LAYER + 1] + vector, atol=1e-3)
    assert not torch.allclose(steered, plain, atol=1e-3)


def test_nothing_before_the_chosen_position_changes(family):
    model, ids, vector = tiny_model(family), random_ids(3, 9), random_vector()
    before, plain = _run(model, ids)
    with Steering(model, {LAYER: vector}, "last"):
        after, steered = _run(model, ids)
    assert torch.equal(after[LAYER][:, :-1], before[LAYER][:, :-1])
    assert torch.equal(after[LAYER][:, -1], before[LAYER][:, -1] + vector)
    assert torch.allclose(steered[:, :-1], plain[:, :-1], atol=1e-5)
    assert not torch.allclose(steered[:, -1], plain[:, -1], atol=1e-3)


def test_read_and_written_at_the_same_place(family):
    model, vector = tiny_language_model(family), random_vector()
    texts = ["w1 w2 w3", "w9 w8 w7 w6 w5"]
    plain = collect_states(model, texts, progress=False).values
    with Steering(model.model, {LAYER: vector}):
        steered = collect_states(model, texts, progress=False).values
    assert torch.equal(steered[:, LAYER], plain[:, LAYER] + vector)
    assert torch.equal(steered[:, :LAYER], plain[:, :LAYER])


def test_opposite_vectors_cancel_and_detaching_restores_every_bit(family):
    model, ids, vector = tiny_model(family), random_ids(2, 7), random_vector()
    _, plain = _run(model, ids)
    with Steering(model, {LAYER: vector}), Steering(model, {LAYER: -vector}):
        assert torch.allclose(_run(model, ids)[1], plain, atol=1e-4)
    assert torch.equal(_run(model, ids)[1], plain)
    assert "generate" not in vars(model)
    assert not any(block._forward_hooks for block in find_blocks(model))


def test_decoding_with_a_cache_is_the_full_pass(family):
    model, ids, vector = tiny_model(family), random_ids(2, 12), random_vector()
    with Steering(model, {0: vector, LAYER: vector}), torch.no_grad():
        full = model(ids, use_cache=False).logits
        name = "cache_params" if family in RECURRENT else "past_key_values"
        output = model(ids[:, :7], use_cache=True)
        steps = [output.logits]
        for token in range(7, 12):
            output = model(
                ids[:, token : token + 1], use_cache=True, **{name: getattr(output, name)}
            )
            steps.append(output.logits)
    assert torch.allclose(torch.cat(steps, dim=1), full, atol=2e-5)


@pytest.mark.parametrize("positions", STEERED_POSITIONS)
def test_generate_steers_exactly_the_chosen_tokens(family, positions):
    model, ids, vector = tiny_model(family), random_ids(2, 6), random_vector()
    with (
        Steering(model, {LAYER: vector}, positions),
        torch.no_grad(),
        BlockOutputs(find_blocks(model)) as seen,
    ):
        tokens = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    chosen = {
        "all": torch.ones(10).bool(),
        "prompt": torch.arange(10) < 6,
        "generated": torch.arange(10) >= 6,
        "last": torch.arange(10) >= 5,
    }[positions]
    # The same tokens read at once, with the vector added by hand.
    shift = (chosen[:, None] * vector)[None]
    hook = find_blocks(model)[LAYER].register_forward_hook(
        lambda _b, _i, out: out + shift if torch.is_tensor(out) else (out[0] + shift, *out[1:])
    )
    with torch.no_grad():
        by_hand = model(tokens[:, :-1], use_cache=False).logits
        with BlockOutputs(find_blocks(model)) as expected:
            model(tokens[:, :-1], use_cache=False)
    hook.remove()
    for layer in range(N_LAYERS):
        assert torch.allclose(seen.joined(layer), expected.joined(layer), atol=1e-4)
    by_hand[..., 2] = float("-inf")  # the end of the text was forbidden
    assert torch.equal(by_hand[:, 5:].argmax(-1), tokens[:, 6:])
