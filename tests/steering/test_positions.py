"""Which tokens are steered: prompt, generated, last, under padding and caches."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DynamicCache, StaticCache

from expertsteer.errors import ModelError, PackError, ParameterError
from expertsteer.models import describe_model, find_blocks
from expertsteer.pack import SteeringPack
from expertsteer.steering import STEERED_POSITIONS, Steering
from helpers import BlockOutputs, random_ids, random_vector, tiny_language_model, tiny_model

LAYER = 1
VECTOR = random_vector()

families = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])


def _shift_of(model, positions, run):
    """Return what steering added to the block's output, and check that it was all or nothing."""
    blocks = find_blocks(model)
    with torch.no_grad(), BlockOutputs(blocks) as plain:
        run()
    with Steering(model, {LAYER: VECTOR}, positions), torch.no_grad(), BlockOutputs(blocks) as seen:
        run()
    # Only the first pass compares: later ones attend to states that differ already.
    before, after = plain.passes[0][LAYER], seen.passes[0][LAYER]
    chosen = (after != before).any(dim=-1)
    assert torch.equal(after[chosen], before[chosen] + VECTOR)
    return chosen


def _padded(ids, lengths, side):
    """Return rows of different lengths as one batch, with its mask."""
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        batch[row, place], mask[row, place] = ids[row, :length], 1
    return batch, mask


@families
def test_a_plain_pass_is_a_prompt(family):
    model, ids = tiny_model(family), random_ids(2, 8)
    everything = torch.ones(2, 8).bool()
    assert torch.equal(_shift_of(model, "prompt", lambda: model(ids)), everything)
    assert torch.equal(_shift_of(model, "generated", lambda: model(ids)), ~everything)
    last = torch.arange(8).expand(2, 8) == 7
    assert torch.equal(_shift_of(model, "last", lambda: model(ids)), last)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_under_padding(family, side):
    model, lengths = tiny_model(family), (4, 8, 6)
    ids, mask = _padded(random_ids(3, 8), lengths, side)
    chosen = _shift_of(model, "last", lambda: model(ids, attention_mask=mask))
    expected = torch.zeros(3, 8).bool()
    for row, length in enumerate(lengths):
        expected[row, 7 if side == "left" else length - 1] = True
    assert torch.equal(chosen, expected)


@families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", STEERED_POSITIONS)
def test_a_padded_row_is_the_row_alone(family, side, positions):
    model, ids, lengths = tiny_model(family), random_ids(3, 8), (4, 8, 6)
    batch, mask = _padded(ids, lengths, side)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with Steering(model, {LAYER: VECTOR}, positions), torch.no_grad():
        together = model(batch, attention_mask=mask, position_ids=places).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length]).logits[0]
            assert torch.allclose(together[row, mask[row].bool()], alone, atol=2e-5)


@families
@pytest.mark.parametrize("make_cache", [lambda model: None, DynamicCache, StaticCache])
@pytest.mark.parametrize("positions", STEERED_POSITIONS)
def test_two_interleaved_caches_keep_their_own_prompts(family, make_cache, positions):
    model = tiny_model(family)
    ids = {4: random_ids(1, 9, seed=1), 6: random_ids(1, 9, seed=2)}

    def cache():
        if make_cache is StaticCache:
            return StaticCache(config=model.config, max_cache_len=16)
        return make_cache(config=model.config) if make_cache is DynamicCache else None

    def decode(prompts, seen):
        """Decode sequences in turn, one token each, every one with its own cache."""
        caches, passes = {}, {n: [] for n in prompts}
        for n in prompts:
            caches[n] = model(ids[n][:, :n], past_key_values=cache()).past_key_values
            passes[n].append(seen.passes[-1][LAYER])
        for step in range(3):
            for n in prompts:
                token = ids[n][:, n + step : n + step + 1]
                model(token, past_key_values=caches[n])
                passes[n].append(seen.passes[-1][LAYER])
        return {n: torch.cat(one, dim=1) for n, one in passes.items()}

    with (
        Steering(model, {LAYER: VECTOR}, positions),
        torch.no_grad(),
        BlockOutputs(find_blocks(model)) as seen,
    ):
        together = decode([4, 6], seen)
        for n in (4, 6):
            with BlockOutputs(find_blocks(model)) as seen:
                alone = decode([n], seen)[n]
            assert torch.allclose(together[n], alone, atol=1e-5)
    index = torch.arange(9)
    for n in (4, 6):
        chosen = {
            "all": index >= 0,
            "prompt": index < n,
            "generated": index >= n,
            "last": index >= n - 1,
        }[positions][: n + 3]
        expected = _by_hand(model, ids[n][:, : n + 3], chosen)
        assert torch.allclose(together[n], expected, atol=2e-5)


def _by_hand(model, ids, chosen):
    """Return a block's output when the vector is added to the chosen tokens by a plain hook."""
    shift = (chosen[:, None] * VECTOR)[None]
    hook = find_blocks(model)[LAYER].register_forward_hook(
        lambda _b, _i, out: out + shift if torch.is_tensor(out) else (out[0] + shift, *out[1:])
    )
    with torch.no_grad(), BlockOutputs(find_blocks(model)) as seen:
        model(ids)
    hook.remove()
    return seen.passes[0][LAYER]


@families
def test_generated_only_leaves_every_bit_of_the_prompt(family):
    model = tiny_model(family)
    ids, mask = _padded(random_ids(2, 7), (4, 7), "left")
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), BlockOutputs(find_blocks(model)) as plain:
        model.generate(ids, **options)
    with (
        Steering(model, {LAYER: VECTOR}, "generated"),
        torch.no_grad(),
        BlockOutputs(find_blocks(model)) as seen,
    ):
        model.generate(ids, **options)
    for layer in range(3):
        assert torch.equal(seen.passes[0][layer], plain.passes[0][layer])
    assert not torch.allclose(seen.passes[1][LAYER], plain.passes[1][LAYER], atol=0.1)


@families
def test_prompt_only_adds_nothing_to_generated_tokens(family):
    model = tiny_model(family)
    ids, mask = _padded(random_ids(2, 7), (4, 7), "left")
    # At the last block a shifted prompt cannot reach later tokens through attention.
    last = len(find_blocks(model)) - 1
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4}
    with (
        Steering(model, {last: VECTOR}, "prompt"),
        torch.no_grad(),
        BlockOutputs(find_blocks(model)) as seen,
    ):
        tokens = model.generate(ids, do_sample=False, **options)
    mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), BlockOutputs(find_blocks(model)) as plain:
        model(tokens[:, :-1], attention_mask=mask, position_ids=places)
    added = seen.joined(last) - plain.joined(last)
    assert torch.allclose(added[:, 7:], torch.zeros(2, 3, 32), atol=2e-5)
    assert torch.allclose(added[1, :7], VECTOR.expand(7, 32), atol=2e-5)


def test_a_cache_filled_before_attaching_is_a_prompt():
    model, ids = tiny_model("llama"), random_ids(1, 8)
    with torch.no_grad():
        caches = [model(ids[:, :6]).past_key_values for _ in range(2)]
        with BlockOutputs(find_blocks(model)) as plain:
            model(ids[:, 6:], past_key_values=caches[0])
        with (
            Steering(model, {LAYER: VECTOR}, "generated"),
            BlockOutputs(find_blocks(model)) as seen,
        ):
            model(ids[:, 6:], past_key_values=caches[1])
    assert torch.equal(seen.passes[0][LAYER], plain.passes[0][LAYER] + VECTOR)


def test_the_state_after_generate_is_forgotten():
    model, ids = tiny_model("llama"), random_ids(1, 8)
    with Steering(model, {LAYER: VECTOR}, "generated"), torch.no_grad():
        model.generate(ids[:, :3], max_new_tokens=2, do_sample=False)
        with BlockOutputs(find_blocks(model)) as seen:
            model(ids)
    with torch.no_grad(), BlockOutputs(find_blocks(model)) as plain:
        model(ids)
    assert torch.equal(seen.passes[0][LAYER], plain.passes[0][LAYER])


@pytest.mark.parametrize("positions", STEERED_POSITIONS)
def test_inputs_given_by_position_and_as_embeddings(positions):
    model, ids = tiny_model("llama"), random_ids(2, 8)
    mask = torch.ones_like(ids)
    with Steering(model, {LAYER: VECTOR}, positions), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(ids, mask).logits, expected)
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, expected)
        # The decoder called by itself, as wrappers do.
        assert torch.equal(model.lm_head(model.model(ids, mask)[0]), expected)


def test_a_model_without_generate_is_steered_too():
    config = tiny_model("llama").config
    model = AutoModelForSequenceClassification.from_config(config).eval()
    chosen = _shift_of(model, "last", lambda: model(random_ids(2, 5)))
    assert torch.equal(chosen, torch.arange(5).expand(2, 5) == 4)


# Composition and ending ---------------------------------------------------------------


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_nested_steerings_add_and_end_in_any_order():
    model, ids = tiny_model("gpt2"), random_ids(2, 6)
    one, two = random_vector(1), random_vector(2)
    plain = _logits(model, ids)
    with Steering(model, {LAYER: one}):
        only_one = _logits(model, ids)
    with Steering(model, {LAYER: one + two}):
        both = _logits(model, ids)
    first = Steering(model, {LAYER: one}, "prompt").attach()
    second = Steering(model, {LAYER: two}, "prompt").attach()
    assert torch.allclose(_logits(model, ids), both, atol=1e-5)
    second.detach()
    assert torch.equal(_logits(model, ids), only_one)
    second.attach()
    first.detach()
    assert not torch.allclose(_logits(model, ids), plain, atol=1e-2)
    assert "generate" in vars(model)
    second.detach()
    assert torch.equal(_logits(model, ids), plain)
    assert "generate" not in vars(model)


def test_different_positions_at_once():
    model, ids, vector = tiny_model("llama"), random_ids(2, 6), VECTOR
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    with Steering(model, {LAYER: vector}):
        everywhere = model.generate(ids, **options)
    with Steering(model, {LAYER: vector}, "prompt"), Steering(model, {LAYER: vector}, "generated"):
        split = model.generate(ids, **options)
    assert torch.equal(split.sequences, everywhere.sequences)
    assert torch.equal(torch.stack(split.logits), torch.stack(everywhere.logits))


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_still_detaches(positions, error):
    model, ids = tiny_model("llama"), random_ids(1, 5)
    plain = _logits(model, ids)

    def interrupt(*_):
        raise error

    with pytest.raises(error), Steering(model, {LAYER: VECTOR}, positions):
        model.generate(ids, max_new_tokens=3, stopping_criteria=[interrupt])
    assert torch.equal(_logits(model, ids), plain)
    assert "generate" not in vars(model)
    # What the interrupted generation announced must not outlive it.
    with Steering(model, {LAYER: VECTOR}, "generated"):
        assert torch.equal(_logits(model, ids), plain)


def test_generate_is_the_models_own_again():
    model = tiny_model("llama")
    steering = Steering(model, {LAYER: VECTOR}, "prompt").attach()
    assert "generate" in vars(model)
    assert model.generate.__doc__ == type(model).generate.__doc__
    steering.detach()
    steering.detach()
    assert model.generate.__func__ is type(model).generate

    def patched(*args, **kwargs):
        return type(model).generate(model, *args, **kwargs)

    model.generate = patched
    try:
        with Steering(model, {LAYER: VECTOR}, "prompt"):
            assert model.generate is not patched
        assert model.generate is patched
    finally:
        del model.generate


def test_attaching_twice_is_an_error():
    steering = Steering(tiny_model("llama"), {LAYER: VECTOR})
    with steering, pytest.raises(ModelError, match="attached already"):
        steering.attach()


def test_the_given_vector_is_not_touched():
    model, vector = tiny_model("llama"), random_vector().requires_grad_()
    kept = vector.detach().clone()
    with Steering(model, {LAYER: vector}):
        _logits(model, random_ids(1, 4))
    assert torch.equal(vector, kept)
    assert vector.grad is None


# Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, 3, 99])
def test_layer_out_of_range(layer):
    with pytest.raises(ModelError, match=rf"layer {layer}, .*expected 0 to 2"):
        Steering(tiny_model("llama"), {layer: VECTOR})


def test_no_layer():
    with pytest.raises(ModelError, match="at least one"):
        Steering(tiny_model("llama"), {})


@pytest.mark.parametrize("shape", [(31,), (1, 32), (32, 1)])
def test_width_that_does_not_match(shape):
    with pytest.raises(ModelError, match=r"expected \(32,\)"):
        Steering(tiny_model("llama"), {LAYER: torch.ones(shape)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vector_that_is_not_finite(value):
    vector = VECTOR.clone()
    vector[5] = value
    with pytest.raises(ParameterError, match="NaN or infinity for layer 1"):
        Steering(tiny_model("llama"), {LAYER: vector})


@pytest.mark.parametrize("positions", ["", "first", "ALL", None])
def test_unknown_positions(positions):
    with pytest.raises(ParameterError, match="expected one of all, prompt, generated, last"):
        Steering(tiny_model("llama"), {LAYER: VECTOR}, positions)


def _pack(family="llama"):
    target = describe_model(tiny_model(family))
    return SteeringPack({LAYER: VECTOR / VECTOR.norm()}, {LAYER: 5.0}, target)


@pytest.mark.parametrize("strength", [0, 0.0, -0.0, float("nan"), float("inf"), float("-inf")])
def test_strength_that_steers_nothing(strength):
    with pytest.raises(ParameterError, match="Got strength="):
        _pack().apply(tiny_model("llama"), strength)


def test_strength_is_relative_or_absolute():
    model, ids = tiny_language_model("llama"), random_ids(1, 4)
    with Steering(model.model, {LAYER: VECTOR / VECTOR.norm() * -0.5}):
        expected = _logits(model.model, ids)
    for options in ({"strength": -0.1}, {"strength": -0.5, "relative": False}):
        with _pack().apply(model, **options):
            assert torch.allclose(_logits(model.model, ids), expected, atol=1e-5)


def test_a_pack_of_another_model():
    with pytest.raises(PackError, match="type llama instead of gpt2"):
        _pack("gpt2").apply(tiny_model("llama"))
    with _pack("gpt2").apply(tiny_model("llama"), force=True):
        pass
    with pytest.raises(PackError, match="4 blocks instead of 3"):
        _pack().apply(tiny_model("llama", n_layers=4), force=True)
