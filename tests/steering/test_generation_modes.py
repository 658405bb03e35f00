"""Steering under every way of generating, and under compiling, training and wrapping."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    TextIteratorStreamer,
)

from expertsteer.chatting import Conversation
from expertsteer.models import find_blocks
from expertsteer.steering import STEERED_POSITIONS, Steering
from helpers import (
    CONTEXT,
    BlockOutputs,
    pack_for,
    random_ids,
    random_vector,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)

VECTORS = {0: random_vector(1, 2.0), 1: random_vector(2, 2.0)}
N_NEW = 8

families = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
each_positions = pytest.mark.parametrize("positions", STEERED_POSITIONS)


def _generate(model, ids, **options):
    defaults = {"do_sample": False, "max_new_tokens": N_NEW, "min_new_tokens": N_NEW}
    torch.manual_seed(0)
    return model.generate(ids, **defaults | options)


def _steered(model, positions, ids, **options):
    with Steering(model, VECTORS, positions):
        return _generate(model, ids, **options)


def _left_padded(ids, lengths):
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        batch[row, -length:], mask[row, -length:] = ids[row, :length], 1
    return batch, mask


@families
def test_every_choice_of_positions_makes_a_difference(family):
    model, ids = tiny_model(family), random_ids(4, 6)
    outputs = [_generate(model, ids)] + [_steered(model, p, ids) for p in STEERED_POSITIONS]
    distinct = {tuple(output.flatten().tolist()) for output in outputs}
    assert len(distinct) == 5


@families
@each_positions
def test_with_and_without_a_cache(family, positions):
    model, ids = tiny_model(family), random_ids(3, 6)
    expected = _steered(model, positions, ids)
    assert torch.equal(_steered(model, positions, ids, use_cache=False), expected)


@families
@each_positions
def test_left_padded_rows_as_alone(family, positions):
    model, ids, lengths = tiny_model(family), random_ids(3, 9), (5, 9, 7)
    batch, mask = _left_padded(ids, lengths)
    for use_cache in (True, False):
        options = {"attention_mask": mask, "use_cache": use_cache}
        together = _steered(model, positions, batch, **options)
        for row, length in enumerate(lengths):
            alone = _steered(model, positions, ids[row : row + 1, :length])
            assert torch.equal(together[row, 9:], alone[0, length:])


@families
@each_positions
def test_beams(family, positions):
    model, ids = tiny_model(family), random_ids(2, 6)
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = _steered(model, positions, ids, **options)
    without_cache = _steered(model, positions, ids, use_cache=False, **options)
    assert torch.equal(together, without_cache)
    for row in range(2):
        alone = _steered(model, positions, ids[row : row + 1], **options)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
    assert not torch.equal(together, _generate(model, ids, **options))


@families
@each_positions
def test_sampling_with_a_seed(family, positions):
    model, ids = tiny_model(family), random_ids(3, 6)
    options = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2}
    first = _steered(model, positions, ids, **options)
    assert torch.equal(_steered(model, positions, ids, **options), first)
    assert torch.equal(_steered(model, positions, ids, use_cache=False, **options), first)
    assert not torch.equal(_generate(model, ids, **options), first)


@families
def test_streaming_from_a_thread(family):
    model, ids, tokenizer = tiny_model(family), random_ids(1, 6), tiny_tokenizer()
    expected = _steered(model, "last", ids)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    with Steering(model, VECTORS, "last"):
        options = {"do_sample": False, "max_new_tokens": N_NEW, "min_new_tokens": N_NEW}
        thread = threading.Thread(
            target=model.generate, args=(ids,), kwargs={"streamer": streamer, **options}
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected[0, 6:])


@families
@each_positions
@pytest.mark.parametrize(
    "drafting",
    [{"assistant_model": "other"}, {"assistant_model": "same"}, {"prompt_lookup_num_tokens": 2}],
    ids=["another model", "a copy", "prompt lookup"],
)
def test_assisted_decoding_gives_the_same_tokens(family, positions, drafting):
    model = tiny_model(family)
    # A repeating prompt, so that looking drafts up in it finds some.
    ids = random_ids(1, 4).repeat(1, 3)
    expected = _steered(model, positions, ids)
    if drafting.get("assistant_model") == "other":
        drafting = {"assistant_model": copy.deepcopy(tiny_model(family, seed=1))}
    elif drafting.get("assistant_model") == "same":
        # An unsteered twin guesses some tokens right and some wrong.
        drafting = {"assistant_model": copy.deepcopy(model)}
    assert torch.equal(_steered(model, positions, ids, **drafting), expected)


@each_positions
def test_a_model_that_drafts_for_itself(positions):
    model, ids = copy.deepcopy(tiny_model("llama")), random_ids(1, 6)
    expected = _steered(model, positions, ids)
    assert torch.equal(_steered(model, positions, ids, assistant_model=model), expected)


@families
@each_positions
def test_embeddings_instead_of_ids(family, positions):
    model = tiny_model(family)
    batch, mask = _left_padded(random_ids(2, 6), (4, 6))
    expected = _steered(model, positions, batch, attention_mask=mask)[:, 6:]
    embedded = model.get_input_embeddings()(batch)
    options = {"attention_mask": mask, "max_new_tokens": N_NEW, "min_new_tokens": N_NEW}
    with Steering(model, VECTORS, positions):
        output = model.generate(inputs_embeds=embedded, do_sample=False, **options)
    assert torch.equal(output, expected)


@families
@each_positions
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_kinds_of_cache(family, positions, cache):
    model = tiny_model(family)
    batch, mask = _left_padded(random_ids(2, 6), (4, 6))
    expected = _steered(model, positions, batch, attention_mask=mask, use_cache=False)
    options = {"attention_mask": mask, "cache_implementation": cache}
    assert torch.equal(_steered(model, positions, batch, **options), expected)


@families
@each_positions
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_in_chunks(family, positions, chunk):
    model = tiny_model(family)
    batch, mask = _left_padded(random_ids(2, 10), (7, 10))
    expected = _steered(model, positions, batch, attention_mask=mask)
    options = {"attention_mask": mask, "prefill_chunk_size": chunk}
    assert torch.equal(_steered(model, positions, batch, **options), expected)


@families
@each_positions
@pytest.mark.parametrize("pass_everything", [True, False])
def test_a_second_turn_on_the_same_cache(family, positions, pass_everything):
    model, ids = tiny_model(family), random_ids(1, 5)
    with Steering(model, VECTORS, positions):
        cache = DynamicCache(config=model.config)
        first = _generate(model, ids, past_key_values=cache)
        # The cache lacks the newest token; here the second turn brings it along.
        turn = torch.cat([first, random_ids(1, 4, seed=9)], dim=1)
        given = turn if pass_everything else turn[:, cache.get_seq_length() :]
        mask = torch.ones_like(turn)
        with BlockOutputs(find_blocks(model)) as seen:
            second = _generate(model, given, past_key_values=cache, attention_mask=mask)
    new = second[:, -N_NEW:]
    assert seen.passes[0][0].shape[1] == 5
    with BlockOutputs(find_blocks(model)) as plain, torch.no_grad():
        model(torch.cat([turn, new], dim=1)[:, :-1])
    # Block 0 is the first to be steered, so it differs by the vector and nothing else.
    added = seen.joined(0)[0] - plain.joined(0)[0, len(turn[0]) - 5 :]
    index = torch.arange(len(added))
    chosen = {
        "all": index >= 0,
        "prompt": index < 5,
        "generated": index >= 5,
        "last": index >= 4,
    }[positions]
    # Sliding windows and rounding aside, keys of block 0 hold nothing steered.
    assert torch.allclose(added, chosen[:, None] * VECTORS[0], atol=2e-5)


@families
@each_positions
def test_repeated_calls_give_the_same(family, positions):
    model, long, short = tiny_model(family), random_ids(2, 9), random_ids(1, 3)
    with Steering(model, VECTORS, positions):
        first = _generate(model, short)
        _generate(model, long)
        assert torch.equal(_generate(model, short), first)


def test_generating_from_nothing():
    model = tiny_model("llama")
    expected = _steered(model, "generated", torch.tensor([[1]]))
    with Steering(model, VECTORS, "generated"):
        output = model.generate(do_sample=False, max_new_tokens=N_NEW, min_new_tokens=N_NEW)
    assert torch.equal(output, expected)


def test_no_pass_is_longer_than_the_context():
    model, ids = tiny_model("gpt2"), random_ids(1, CONTEXT - 3)
    assert _steered(model, "last", ids, max_new_tokens=3, min_new_tokens=3).shape[1] == CONTEXT


# Compiling ----------------------------------------------------------------------------


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Tracing takes seconds a block and pass: two blocks show all that three would.
def _model_to_compile(family="llama"):
    return copy.deepcopy(tiny_model(family, n_layers=2))


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.parametrize(
    ("family", "positions"), [("llama", "last"), ("gpt2", "all"), ("gemma3_text", "last")]
)
def test_compiled_before_and_after_attaching(family, positions):
    model, ids = _model_to_compile(family), random_ids(2, 6)
    plain = _logits(model, ids)
    with Steering(model, VECTORS, positions):
        expected = _logits(model, ids)
    compiled = torch.compile(model, backend="eager")
    # Attached before the first compiled pass, then detached, then attached again.
    with Steering(compiled, VECTORS, positions):
        assert torch.allclose(_logits(compiled, ids), expected, atol=1e-5)
    assert torch.allclose(_logits(compiled, ids), plain, atol=1e-5)
    with Steering(model, VECTORS, positions):
        assert torch.allclose(_logits(compiled, ids), expected, atol=1e-5)
    assert torch.allclose(_logits(compiled, ids), plain, atol=1e-5)


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.parametrize("clear", [False, True])
def test_compiled_in_place(clear):
    model, ids = _model_to_compile(), random_ids(2, 6)
    with Steering(model, VECTORS, "last"):
        expected = _generate(model, ids)
    plain = _generate(model, ids)
    for block in find_blocks(model):
        block.compile(backend="eager")
    assert torch.equal(_generate(model, ids), plain)
    if clear:
        torch._dynamo.utils.counters.clear()  # as profilers do
    with Steering(model, VECTORS, "last"):
        assert torch.equal(_generate(model, ids), expected)
    assert torch.equal(_generate(model, ids), plain)


@pytest.mark.usefixtures("_no_compiled_code")
@each_positions
def test_compiled_generation(positions):
    model, ids = _model_to_compile(), random_ids(2, 6)
    expected = _steered(model, positions, ids, max_new_tokens=4, min_new_tokens=4)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    output = _steered(model, positions, ids, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(output, expected)


@pytest.mark.usefixtures("_no_compiled_code")
def test_compiled_by_inductor():
    model, ids = _model_to_compile(), random_ids(2, 6)
    plain = _logits(model, ids)
    compiled = torch.compile(model)
    with Steering(compiled, {0: VECTORS[0]}):
        expected = _logits(model, ids)
        assert torch.allclose(_logits(compiled, ids), expected, atol=1e-4)
    assert torch.allclose(_logits(compiled, ids), plain, atol=1e-4)


# Training and wrapping ------------------------------------------------------------------


@families
@each_positions
def test_gradient_checkpointing_changes_nothing(family, positions):
    ids, grads, losses = random_ids(2, 8), [], []
    for checkpointing in (False, True):
        model = copy.deepcopy(tiny_model(family)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        with Steering(model, VECTORS, positions):
            loss = model(ids, labels=ids).loss
        # The backward pass computes blocks again, here after steering ended.
        loss.backward()
        losses.append(loss.detach())
        grads.append([parameter.grad for parameter in model.parameters()])
    assert torch.equal(losses[0], losses[1])
    for plain, again in zip(*grads, strict=True):
        assert torch.allclose(plain, again, atol=1e-6)


def test_checkpointed_batches_of_different_lengths_in_one_backward_pass():
    model = copy.deepcopy(tiny_model("llama")).train()
    model.gradient_checkpointing_enable()
    with Steering(model, VECTORS, "last"):
        loss = sum(model(ids, labels=ids).loss for ids in (random_ids(2, 8), random_ids(2, 5)))
        loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    model = copy.deepcopy(tiny_model("llama")).train()
    with Steering(model, VECTORS, "last"):
        for ids in (random_ids(2, 8), random_ids(2, 5)):
            model(ids, labels=ids).loss.backward()
    for one, other in zip(found, model.parameters(), strict=True):
        assert torch.allclose(one, other.grad, atol=1e-5)


@each_positions
def test_peft(positions):
    peft = pytest.importorskip("peft")
    plain, ids = tiny_model("llama"), random_ids(2, 6)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(plain), settings).eval()
    # A fresh adapter adds nothing, so the steered outputs must agree.
    assert torch.equal(_steered(wrapped, positions, ids), _steered(plain, positions, ids))
    with Steering(wrapped, VECTORS, positions):
        steered = _logits(wrapped, ids)
    with Steering(plain, VECTORS, positions):
        assert torch.equal(_logits(plain, ids), steered)
    assert torch.equal(_logits(wrapped, ids), _logits(plain, ids))


@each_positions
def test_spread_over_devices_by_accelerate(positions):
    accelerate = pytest.importorskip("accelerate")
    plain, ids = tiny_model("llama"), random_ids(2, 6)
    expected = _steered(plain, positions, ids)
    model = copy.deepcopy(plain)
    # Some blocks wait in memory and are brought in by hooks, as with a device map.
    placed = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu"
    )
    placed |= {"model.layers.1": "meta", "model.layers.2": "cpu"}
    del placed["model.layers.1"]
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(_steered(model, positions, ids), expected)


@pytest.fixture(scope="module")
def vision_language_model():
    """Return a model whose image tower has as many blocks, as wide, as the text decoder."""
    text = tiny_model("llama").config
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 8,
        "patch_size": 4,
    }
    config = AutoConfig.for_model(
        "llava", vision_config=tower, text_config=text.to_dict(), image_token_index=99
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@each_positions
def test_the_text_half_of_a_vision_language_model(vision_language_model, positions):
    model = vision_language_model
    assert find_blocks(model) is model.model.language_model.layers
    ids = random_ids(1, 9).clamp(max=98)
    ids[:, 1:5] = 99
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with (
        Steering(model, {0: VECTORS[0]}, positions),
        torch.no_grad(),
        BlockOutputs(find_blocks(model)) as seen,
    ):
        _generate(model, ids, pixel_values=pixels)
    with BlockOutputs(find_blocks(model)) as plain, torch.no_grad():
        _generate(model, ids, pixel_values=pixels)
    added = seen.passes[0][0] - plain.passes[0][0]
    chosen = {"all": slice(None), "prompt": slice(None), "last": slice(8, 9)}.get(positions)
    expected = torch.zeros(1, 9, 32)
    if chosen is not None:
        expected[:, chosen] = VECTORS[0]
    assert torch.allclose(added, expected, atol=1e-6)


def test_a_model_that_is_steered_can_go():
    model = copy.deepcopy(tiny_model("llama"))
    gone = weakref.ref(model)
    Steering(model, VECTORS, "generated").attach()
    assert "generate" in vars(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_abandoned_reply_ends_and_leaves_the_model_as_it_was():
    model = tiny_language_model("llama")
    pack = pack_for(model)
    conversation = Conversation(model, [pack], strength=0.5, max_new_tokens=40, temperature=0)
    reply = conversation.reply("w1 w2")
    next(reply)
    reply.close()
    assert not any(block._forward_hooks for block in model.blocks)
    assert conversation.turns == []
    assert "".join(conversation.reply("w1 w2"))
