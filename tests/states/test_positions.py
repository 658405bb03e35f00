"""Which tokens a state is read from, with and without padding, prompts and cuts."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from expertsteer.data import RenderedText
from expertsteer.errors import DataError, ParameterError
from expertsteer.models import LanguageModel, find_blocks
from expertsteer.states import TOKEN_POSITIONS, collect_states
from expertsteer.states.positions import TokenIds, locate_tokens
from helpers import CONTEXT, BlockOutputs, tiny_language_model, tiny_model, tiny_tokenizer

PROMPTS = ["w1 w2 w3", "w4", "w5 w6"]
ANSWERS = ["w7 w8", "w9 w10 w11 w12", "w13"]
TEXTS = [
    RenderedText(f"{prompt} {answer}", len(prompt), False)
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
]
LONG = " ".join(f"w{n}" for n in range(80))


def _padded_pass(side):
    """Return all blocks' outputs of one padded batch, its mask, (layers, batch, tokens, width)."""
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.padding_side = side
    inputs = tokenizer([text.text for text in TEXTS], padding=True, return_tensors="pt")
    model = tiny_model("llama")
    with torch.no_grad(), BlockOutputs(find_blocks(model)) as seen:
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    hidden = torch.stack([seen.passes[0][layer] for layer in range(len(seen.blocks))])
    return LanguageModel(model, tokenizer, "tiny"), hidden, inputs["attention_mask"].bool()


def _by_hand(tokens, position, row):
    """Reduce the real tokens of one text, (layers, tokens, width), to its state."""
    n_prompt = 1 + len(PROMPTS[row].split())  # <bos> comes first
    if position == "last":
        return tokens[:, -1]
    if position == "prompt_last":
        return tokens[:, n_prompt - 1]
    return tokens[:, n_prompt:].mean(dim=1)


def test_token_ids_compare_and_hash_as_tuples_do():
    rng = random.Random(0)
    # From short to beyond 2 bytes, some the beginnings of others.
    tuples = [tuple(rng.choices((0, 1, 255, 256, 70_000), k=rng.randint(0, 4))) for _ in range(200)]
    packed = [TokenIds(ids) for ids in tuples]
    assert [tuple(ids) for ids in sorted(packed)] == sorted(tuples)
    assert [tuple(ids) for ids in dict.fromkeys(packed)] == list(dict.fromkeys(tuples))
    for one, other in itertools.product(tuples[:40], tuples[:40]):
        assert TokenIds(one).starts_with(TokenIds(other)) == (one[: len(other)] == other)
    ids = TokenIds([3, 1, 2])
    assert (len(ids), ids[-1], ids[1:], list(ids)) == (3, 2, TokenIds([1, 2]), [3, 1, 2])
    assert ids != (3, 1, 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", TOKEN_POSITIONS)
def test_states_are_those_of_a_padded_pass_by_hand(position, side):
    model, hidden, mask = _padded_pass(side)
    states = collect_states(model, TEXTS, position=position, progress=False)
    for row in range(len(TEXTS)):
        expected = _by_hand(hidden[:, row, mask[row]], position, row)
        torch.testing.assert_close(states.values[row], expected, rtol=1e-4, atol=1e-5)


def test_a_template_that_wrote_special_tokens_gets_no_second_ones():
    model = tiny_language_model("llama", chat=True)
    text = RenderedText("<user> w1 <eos> <assistant> w2", 27, True)
    spans, _ = locate_tokens(model, [text], "prompt_last")
    assert model.tokenizer.decode(list(spans[0].ids)) == "<user>w1<eos><assistant>w2"
    assert spans[0].ids[spans[0].start] == model.tokenizer.convert_tokens_to_ids("<assistant>")


def test_a_token_across_the_border_belongs_to_the_answer():
    # Character 4 lies inside "w12".
    spans, _ = locate_tokens(
        tiny_language_model("llama"), [RenderedText("w1 w12 w3", 4, False)], "answer_mean"
    )
    assert (spans[0].start, spans[0].end) == (2, 4)


def test_long_texts_lose_their_beginning_behind_the_first_token():
    model = tiny_language_model("llama")
    whole = model.tokenizer(LONG)["input_ids"]
    spans, n_cut = locate_tokens(model, [RenderedText(LONG, 0, False), *TEXTS])
    assert n_cut == 1
    assert list(spans[0].ids) == [whole[0], *whole[-(CONTEXT - 1) :]]
    assert (spans[0].start, spans[0].end) == (CONTEXT - 1, CONTEXT)


@pytest.mark.parametrize("position", ["answer_mean", "prompt_last"])
def test_a_cut_moves_the_answer_along(position):
    model = tiny_language_model("llama")
    text = RenderedText(LONG, LONG.index(" w75"), False)
    span = locate_tokens(model, [text], position)[0][0]
    words = model.tokenizer.convert_ids_to_tokens(list(span.ids[span.start : span.end]))
    expected = {"answer_mean": ["w75", "w76", "w77", "w78", "w79"], "prompt_last": ["w74"]}
    assert words == expected[position]


def test_the_mean_over_a_cut_answer_is_over_what_is_left():
    span = locate_tokens(
        tiny_language_model("llama"), [RenderedText(LONG, 0, False)], "answer_mean"
    )[0][0]
    assert (span.start, span.end) == (1, CONTEXT)


def test_a_prompt_that_was_cut_away_has_no_last_token():
    text = RenderedText(LONG, 5, False)
    message = r"^Got text 2 .* answer alone fills the 64 tokens of .*, but expected room .* Shorten"
    with pytest.raises(DataError, match=message):
        locate_tokens(tiny_language_model("llama"), [TEXTS[0], text], "prompt_last")


def test_the_first_token_stays_where_it_is_in_a_cut_text():
    # Without a prompt the last token before the answer is <bos>, which a cut keeps.
    span = locate_tokens(
        tiny_language_model("llama"), [RenderedText(LONG, 0, False)], "prompt_last"
    )[0][0]
    assert (span.ids[0], span.start, span.end) == (1, 0, 1)


def test_unknown_position_is_refused():
    with pytest.raises(
        ParameterError, match=r"^Got position='first', but expected one of last, an"
    ):
        collect_states(tiny_language_model("llama"), ["w1"], position="first")


@pytest.mark.parametrize(
    ("text", "position"),
    [
        (RenderedText("", 0, False), "last"),
        (RenderedText("w1 w2", 5, False), "answer_mean"),
        (RenderedText("w1 w2", 0, False), "prompt_last"),
    ],
)
def test_a_text_without_a_token_there_is_named(text, position):
    model = LanguageModel(tiny_model("llama"), tiny_tokenizer(bos=False), "tiny")
    message = rf"^Got text 2 \('{text.text}'\), but expected a token at position '{position}'. Rem"
    with pytest.raises(DataError, match=message):
        locate_tokens(model, [TEXTS[0], text], position)


def test_a_tokenizer_without_offsets_serves_the_last_position_only():
    class SlowTokenizer(SimpleNamespace):
        is_fast = False
        model_max_length = 64

        def __call__(self, text, **_options):
            return {"input_ids": [ord(c) - ord("a") for c in text]}

    model = LanguageModel(tiny_model("llama"), SlowTokenizer(), "slow")
    text = RenderedText("bcd", 1, False)
    assert locate_tokens(model, [text]) == ([(TokenIds([1, 2, 3]), 2, 3)], 0)
    with pytest.raises(DataError, match=r"^Got position='answer_mean', but expected pos.*offsets"):
        locate_tokens(model, [text], "answer_mean")
