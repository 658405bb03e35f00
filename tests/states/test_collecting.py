"""One pass over the texts, whatever the batches, and not further than needed."""

from __future__ import annotations

import copy
import random
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

from expertsteer.data import RenderedText
from expertsteer.errors import DataError, ExpertSteerError, ModelError, StatesError
from expertsteer.models import LanguageModel
from expertsteer.states import collect_states, corpus_fingerprint, states_key
from helpers import (
    FAMILIES,
    N_LAYERS,
    WIDTH,
    final_norm,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)

TEXTS = [" ".join(f"w{(7 * n + k) % 90}" for k in range(1 + n % 9)) for n in range(20)]


def _own() -> LanguageModel:
    """Return a model that a test may change."""
    return LanguageModel(copy.deepcopy(tiny_model("llama")), tiny_tokenizer(), "own")


def _count_calls(module: torch.nn.Module) -> list[tuple[int, ...]]:
    """Return a list that grows by an input's shape with every call of a module."""
    calls: list[tuple[int, ...]] = []
    module.register_forward_hook(
        lambda _m, args, kwargs, _out: calls.append(
            tuple((args[0] if args else kwargs["input_ids"]).shape)
        ),
        with_kwargs=True,
    )
    return calls


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "mamba", "mixtral"])
@pytest.mark.parametrize("position", ["last", "answer_mean"])
def test_a_text_alone_has_the_state_it_has_in_a_batch(family, position):
    model = tiny_language_model(family)
    together = collect_states(model, TEXTS, position=position, progress=False)
    alone = collect_states(model, TEXTS, position=position, batch_tokens=1, progress=False)
    torch.testing.assert_close(together.values, alone.values, rtol=1e-4, atol=1e-5)
    assert len({row.numpy().tobytes() for row in alone.values[:, -1]}) == len(TEXTS)


def test_a_batch_that_is_a_quarter_full_takes_no_shorter_text():
    model = _own()
    calls = _count_calls(model.blocks[0])
    collect_states(model, TEXTS, batch_tokens=40, progress=False)
    lengths = sorted((len(model.tokenizer(text)["input_ids"]) for text in set(TEXTS)), reverse=True)
    begin = 0
    for rows, longest, *_ in calls:
        batch = lengths[begin : begin + rows]
        begin += rows
        assert longest == batch[0]
        # Only up to the last of its longest texts may it have been less than a quarter full.
        n_shorter = sum(length < longest for length in batch)
        assert not n_shorter or (rows - 1) * longest < 40 / 4
    assert begin == len(lengths)
    assert len(calls) > 1


def test_no_batch_holds_more_tokens_than_allowed_unless_one_text_does():
    model = _own()
    calls = _count_calls(model.blocks[0])
    collect_states(model, TEXTS, batch_tokens=24, progress=False)
    sizes = [rows * tokens for rows, tokens, _width in calls]
    assert max(sizes) <= 24
    assert sum(rows for rows, _tokens, _width in calls) == len(TEXTS)
    calls.clear()
    collect_states(model, TEXTS[:9], batch_tokens=4, progress=False)
    assert all(rows == 1 for rows, tokens, _width in calls if tokens > 2)


def _beginnings() -> list[str]:
    """Return every beginning of three texts, two of which begin alike, in no order."""
    words = [[f"w{(7 * n + k) % 90}" for k in range(12)] for n in range(3)]
    words[2][:5] = words[1][:5]
    texts = {" ".join(text[:length]) for text in words for length in range(1, 13)}
    return random.Random(0).sample(sorted(texts), len(texts))


@pytest.mark.parametrize("family", FAMILIES)
def test_beginnings_of_a_text_have_the_states_they_have_apart(family):
    model = tiny_language_model(family)
    texts = _beginnings()
    together = collect_states(model, texts, progress=False)
    apart = [collect_states(model, [text], progress=False).values for text in texts]
    torch.testing.assert_close(together.values, torch.cat(apart), rtol=1e-4, atol=1e-5)
    in_small_batches = collect_states(model, texts, batch_tokens=24, progress=False)
    torch.testing.assert_close(in_small_batches.values, together.values, rtol=1e-4, atol=1e-5)


def test_a_text_is_read_once_for_all_its_beginnings():
    model = _own()
    calls = _count_calls(model.blocks[0])
    collect_states(model, _beginnings(), progress=False)
    assert [rows for rows, _tokens, _width in calls] == [3]
    # A mean over tokens is read from its own text.
    calls.clear()
    collect_states(model, _beginnings(), position="answer_mean", progress=False)
    assert sum(rows for rows, _tokens, _width in calls) == len(_beginnings())


def _answers() -> list[RenderedText]:
    """Return answers to prompts of several lengths, one of them alone with its prompt."""
    texts = []
    for n, n_answers in enumerate((4, 2, 1, 3)):
        prompt = " ".join(f"w{(5 * n + k) % 90}" for k in range(9 + 4 * n))
        for m in range(n_answers):
            answer = " ".join(f"w{(11 * m + n + k) % 90}" for k in range(1 + m))
            texts.append(RenderedText(f"{prompt} {answer}", len(prompt) + 1, False))
    return texts


@pytest.mark.parametrize("position", ["last", "answer_mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_share_a_prompt_have_the_states_they_have_apart(family, position):
    model = tiny_language_model(family)
    texts = _answers()
    layers = range(N_LAYERS - 1)  # the pass ends before the last block
    options = {"position": position, "layers": layers, "progress": False}
    together = collect_states(model, texts, **options)
    apart = [collect_states(model, [text], **options).values for text in texts]
    torch.testing.assert_close(together.values, torch.cat(apart), rtol=1e-4, atol=1e-5)
    in_small_batches = collect_states(model, texts, batch_tokens=24, **options)
    torch.testing.assert_close(in_small_batches.values, together.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["last", "answer_mean"])
def test_answers_of_several_lengths_are_read_in_batches_of_their_own(position, monkeypatch):
    model = _own()
    texts = _answers()
    options = {"position": position, "progress": False}
    expected = collect_states(model, texts, **options)
    monkeypatch.setattr("expertsteer.models.batches.CONTINUATION_TOKENS", 3)
    calls = _count_calls(model.blocks[0])
    found = collect_states(model, texts, **options)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5)
    answers = [(rows, tokens) for rows, tokens, _width in calls if tokens < 9]
    assert len(answers) > 3
    assert all(rows == 1 or rows * tokens <= 3 for rows, tokens in answers)


def test_a_prompt_is_read_once_for_all_its_answers():
    model = _own()
    calls = _count_calls(model.blocks[0])
    texts = _answers()
    collect_states(model, texts, batch_tokens=1, progress=False)
    prompts = {text.text[: text.answer_start] for text in texts}
    long_passes = [rows for rows, tokens, _width in calls if tokens > 8]
    assert long_passes == [1] * len(prompts)
    assert sum(rows for rows, _tokens, _width in calls) == len(prompts) + 4 + 2 + 3


def test_one_pass_serves_all_layers_and_never_reaches_the_head():
    model = _own()
    passes = _count_calls(model.blocks[0])
    beyond = [_count_calls(m) for m in (final_norm(model.model), model.model.lm_head)]
    collect_states(model, TEXTS, batch_tokens=10_000, progress=False)
    assert len(passes) == 1
    assert beyond == [[], []]


def test_the_pass_stops_behind_the_last_wanted_block():
    model = _own()
    calls = [_count_calls(block) for block in model.blocks]
    collect_states(model, TEXTS, layers=[0], batch_tokens=10_000, progress=False)
    assert [len(block) for block in calls] == [1, 0, 0]


def test_fewer_layers_are_a_part_of_all_in_order():
    model = tiny_language_model("llama")
    everything = collect_states(model, TEXTS, progress=False)
    part = collect_states(model, TEXTS, layers=[2, 0], progress=False)
    assert part.layers == (0, 2)
    assert torch.equal(part.values, everything.values[:, [0, 2]])
    assert torch.equal(part.layer(2), everything.layer(2))


def test_a_text_that_occurs_twice_is_computed_once():
    model = _own()
    calls = _count_calls(model.blocks[0])
    states = collect_states(model, ["w1 w2", "w3", "w1 w2"], progress=False)
    assert sum(rows for rows, _tokens, _width in calls) == 2
    assert torch.equal(states.values[0], states.values[2])
    assert not torch.equal(states.values[0], states.values[1])


def test_nothing_is_left_attached_to_the_model():
    model = tiny_language_model("llama")
    collect_states(model, TEXTS, progress=False)
    assert not any(block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize(
    ("position", "dtype"), [("last", torch.bfloat16), ("answer_mean", torch.float32)]
)
def test_states_keep_the_models_dtype_and_means_are_float32(position, dtype):
    half = copy.deepcopy(tiny_model("llama")).to(torch.bfloat16)
    model = LanguageModel(half, tiny_tokenizer(), "half")
    states = collect_states(model, TEXTS, position=position, progress=False)
    assert states.values.dtype == dtype
    assert states.values.shape == (len(TEXTS), N_LAYERS, WIDTH)
    assert states.description.dtype == str(dtype).removeprefix("torch.")
    assert states.layer(0).dtype == torch.float32


def test_cut_texts_are_counted_in_a_warning():
    long = " ".join(["w1"] * 70)
    with pytest.warns(UserWarning, match=r"^2 of 4 texts are longer than the 64 tokens of tiny-ll"):
        collect_states(tiny_language_model("llama"), ["w1", long, long + " w2", "w3"])


def test_texts_that_fit_cause_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect_states(tiny_language_model("llama"), [" ".join(["w1"] * 63)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", ["last", "answer_mean"])
def test_states_that_are_not_finite_name_model_and_layer(value, position):
    model = _own()
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight[0, 0] = value
    assert collect_states(model, TEXTS, layers=[0], position=position, progress=False)
    message = r"^Got NaN or infinite states from own at layer 1 and 1 more, but expected finite"
    with pytest.raises(DataError, match=message):
        collect_states(model, TEXTS, position=position, progress=False)


def test_states_that_are_not_finite_are_not_saved(tmp_path):
    model = _own()
    with torch.no_grad():
        model.model.get_input_embeddings().weight[-1] = float("nan")
    texts = ["w1 w2 w3", "w93"]  # the second reads the broken embedding
    for _attempt in range(2):
        with pytest.raises(DataError, match="at layer 0"):
            collect_states(model, texts, batch_tokens=1, save_to=tmp_path, progress=False)


def test_no_texts_and_wrong_layers_are_refused():
    model = tiny_language_model("llama")
    with pytest.raises(DataError, match=r"^Got no texts to collect states from, but expected at"):
        collect_states(model, [])
    with pytest.raises(ModelError, match=r"^Got layer 3, but expected 0 to 2. tiny-llama has 3"):
        collect_states(model, TEXTS, layers=[3])


def test_too_little_memory_is_told_before_the_first_pass(monkeypatch, tmp_path):
    model = _own()
    calls = _count_calls(model.blocks[0])
    need = len(TEXTS) * N_LAYERS * WIDTH * 4
    for available in (need, need - 1):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr("psutil.virtual_memory", lambda m=memory: m)
        if available == need:
            collect_states(model, TEXTS, progress=False)
            calls.clear()
        else:
            with pytest.raises(
                ExpertSteerError, match=r"^Got .* free memory, but expected .* Name"
            ):
                collect_states(model, TEXTS, save_to=tmp_path / "states", progress=False)
    assert calls == []
    assert not (tmp_path / "states").exists()


def test_a_layer_that_was_not_collected_is_refused():
    states = collect_states(tiny_language_model("llama"), TEXTS, layers=[0, 2], progress=False)
    with pytest.raises(
        StatesError, match=r"^Got layer 1, but these states hold the layers 0, 2. C"
    ):
        states.layer(1)


def test_rows_and_norms_are_those_of_the_chosen_texts():
    states = collect_states(tiny_language_model("llama"), TEXTS, layers=[0, 2], progress=False)
    some = states.rows(torch.tensor([3, 1]))
    assert torch.equal(some.values, states.values[[3, 1]])
    expected = sum(float(row[1].square().sum().sqrt()) for row in some.values) / 2
    assert some.mean_residual_norm(2) == pytest.approx(expected)


def test_corpus_fingerprint_does_not_see_the_template():
    plain = [RenderedText("w1 w2", 0, False), RenderedText("w3", 0, False)]
    chat = [RenderedText(f"<user> {t.text} <eos>", 7, True, t.text) for t in plain]
    model = tiny_language_model("llama", chat=True)
    first = collect_states(model, plain, progress=False).description
    second = collect_states(model, chat, progress=False).description
    assert first.corpus == second.corpus == corpus_fingerprint(plain)
    assert first.texts != second.texts


def test_corpus_fingerprint_sees_words_order_and_borders():
    corpora = (["w1", "w2"], ["w2", "w1"], ["w1 w2"], ["w1w2"], ["w1", "w3"], ["w1"])
    prints = {corpus_fingerprint([RenderedText(t, 0, False) for t in c]) for c in corpora}
    assert len(prints) == len(corpora)
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in prints)


def test_states_key_sees_all_that_decides_the_states():
    llama = tiny_language_model("llama")
    half = LanguageModel(copy.deepcopy(llama.model).to(torch.bfloat16), llama.tokenizer, llama.name)
    texts = [RenderedText("w1 w2", 0, False)]
    keys = [
        states_key(llama, texts, "last"),
        states_key(llama, texts, "answer_mean"),
        states_key(llama, [RenderedText("w1 w2", 3, False)], "last"),
        states_key(llama, [RenderedText("w1 w2", 0, True)], "last"),
        states_key(tiny_language_model("qwen2"), texts, "last"),
        states_key(half, texts, "last"),
    ]
    assert len(set(keys)) == len(keys)
    assert states_key(llama, list(texts), "last") == keys[0]
