"""The embedded server as the official client sees it."""

from __future__ import annotations

import json
from contextlib import ExitStack

import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion

from expertsteer.generation import continue_prompts, generate_side_by_side
from expertsteer.pack import SteeringPack

PROMPT = "w1 w2 w3"
CHAT = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"}]
HAPPY = {"pack": "happy", "strength": 1.5}
FORMAL = {"pack": "formal", "strength": -2.0, "positions": "generated"}


def complete(client, n=8, steering=None, **options):
    settings = {"model": "tiny", "prompt": PROMPT, "max_tokens": n, "temperature": 0}
    extra = {} if steering is None else {"extra_body": {"steering": steering}}
    return client.completions.create(**settings | options, **extra)


def chat(client, n=8, steering=None, **options):
    settings = {"model": "tiny", "messages": CHAT, "max_tokens": n, "temperature": 0}
    extra = {} if steering is None else {"extra_body": {"steering": steering}}
    return client.chat.completions.create(**settings | options, **extra)


def locally(target, packs, *steered, prompt=PROMPT, n=8):
    """Return the greedy continuation that the package itself makes."""
    with ExitStack() as stack:
        for name, strength, positions in steered:
            pack = SteeringPack.load(packs[name])
            stack.enter_context(pack.apply(target, strength, positions))
        ids = target.tokenizer(prompt)["input_ids"]
        return continue_prompts(target, [ids], n, do_sample=False)[0]


# Answers --------------------------------------------------------------------------------


def test_the_model_and_its_packs_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "expertsteer")
    assert model.packs == [
        {"name": "happy", "strength": 0.5, "layers": [0, 2]},
        {"name": "formal", "strength": 0.5, "layers": [1, 2]},
    ]
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.models.retrieve("owner/other")


def test_greedy_text_is_that_of_generate(client, target, packs):
    pack = SteeringPack.load(packs["happy"])
    (generated,) = generate_side_by_side(
        target, [pack], [PROMPT], [1.5], max_new_tokens=8, progress=False
    )
    unsteered, steered = generated.continuations[0.0], generated.continuations[1.5]
    assert unsteered != steered
    assert complete(client).choices[0].text == unsteered
    assert complete(client, steering=HAPPY).choices[0].text == steered
    # What one request asked for is gone with it.
    assert complete(client).choices[0].text == unsteered


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_positions(client, target, packs, positions):
    answer = complete(client, steering=HAPPY | {"positions": positions})
    assert answer.choices[0].text == locally(target, packs, ("happy", 1.5, positions))


def test_several_packs_add_up_and_strength_defaults_to_the_packs(client, target, packs):
    answer = complete(client, steering=[{"pack": "happy"}, FORMAL])
    expected = locally(target, packs, ("happy", 0.5, "all"), ("formal", -2.0, "generated"))
    assert answer.choices[0].text == expected
    assert expected != locally(target, packs)


def test_chats_go_through_the_template(client, target, packs):
    prompt = target.chat_prompt(CHAT)
    ids = target.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with SteeringPack.load(packs["happy"]).apply(target, 1.5):
        expected = continue_prompts(target, [ids], 8, do_sample=False)[0]
    answer = chat(client, steering=HAPPY)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 8
    parts = [
        {"role": "developer", "content": "w9"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": " w2"}],
        },
    ]
    assert chat(client, steering=HAPPY, messages=parts).choices[0].message.content == expected


def test_bodies_are_those_of_the_api(client):
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=2, logprobs=1
    )
    Completion.model_validate(json.loads(raw.content), strict=True)
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=CHAT, max_tokens=2, logprobs=True, top_logprobs=2
    )
    ChatCompletion.model_validate_json(raw.content, strict=True)


@pytest.mark.parametrize("steering", [None, HAPPY, [HAPPY, FORMAL]])
def test_a_stream_is_the_whole_answer_in_pieces(client, steering):
    whole = complete(client, steering=steering)
    pieces = list(
        complete(client, steering=steering, stream=True, stream_options={"include_usage": True})
    )
    texts = [choice.text for piece in pieces for choice in piece.choices]
    assert "".join(texts) == whole.choices[0].text
    assert sum(map(bool, texts)) > 4
    reasons = [choice.finish_reason for piece in pieces for choice in piece.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert pieces[-1].usage == whole.usage
    assert pieces[-1].choices == []
    assert len({piece.id for piece in pieces}) == 1


def test_a_chat_stream(client):
    whole = chat(client, steering=HAPPY).choices[0]
    first, *pieces = chat(client, steering=HAPPY, stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == "length"
    assert pieces[-1].usage is None


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings_end_a_text_and_are_not_in_it(client, streamed):
    whole = complete(client).choices[0].text
    words = ["w" + word for word in whole.split("w")[1:]]
    stop = "".join(words[3:5])
    expected = whole[: whole.index(stop)]
    answer = complete(client, stop=["nowhere", stop], stream=streamed)
    if streamed:
        choices = [piece.choices[0] for piece in answer]
        assert "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == "stop"
    else:
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "stop"
        # The token that completes the stop string is the last one generated.
        assert 3 <= answer.usage.completion_tokens <= 5


def test_log_probabilities_are_those_of_the_model(client, target, packs):
    answer = complete(client, n=4, steering=HAPPY, logprobs=3)
    told = answer.choices[0].logprobs
    ids = target.tokenizer(PROMPT)["input_ids"]
    chosen = [target.tokenizer.convert_tokens_to_ids(token) for token in told.tokens]
    with SteeringPack.load(packs["happy"]).apply(target, 1.5), torch.inference_mode():
        logits = target.model(torch.tensor([ids + chosen])).logits[0]
    expected = logits.log_softmax(-1)[len(ids) - 1 : -1]
    for row, token, logprob, top in zip(
        expected, chosen, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert list(top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.text_offset == [0, *torch.tensor([*map(len, told.tokens)]).cumsum(0).tolist()][:-1]
    # Temperature and nucleus choose tokens; they do not change what is told of them.
    sampled = complete(client, n=1, logprobs=1, steering=HAPPY, temperature=0.1, top_p=0.5)
    assert sampled.choices[0].logprobs.token_logprobs == told.token_logprobs[:1]


def test_log_probabilities_of_chats_and_streams(client):
    whole = chat(client, n=4, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in whole] == [2] * 4
    assert bytes(whole[0].bytes).decode() == whole[0].token
    streamed = [
        token
        for piece in chat(client, n=4, logprobs=True, top_logprobs=2, stream=True)
        if piece.choices[0].logprobs
        for token in piece.choices[0].logprobs.content
    ]
    assert streamed == whole
    assert chat(client, n=2).choices[0].logprobs is None


def test_a_seed_repeats_a_sample(client):
    first, again, other, unseeded, default = (
        complete(client, n=20, **({"temperature": 1.5} | options)).choices[0].text
        for options in (
            {"seed": 1},
            {"seed": 1},
            {"seed": -2},
            {},
            {"temperature": openai.omit},
        )
    )
    assert first == again
    assert len({first, other, unseeded, default}) == 4
    # A nucleus this small is greedy.
    assert complete(client, n=8, temperature=1, top_p=1e-6).choices[0].text == (
        complete(client).choices[0].text
    )


def test_several_prompts_and_token_ids(client, target):
    ids = target.tokenizer(PROMPT)["input_ids"]
    both = complete(client, prompt=[PROMPT, "w7"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == complete(client).choices[0].text
    assert both.choices[1].text == complete(client, prompt="w7").choices[0].text
    assert both.usage.prompt_tokens == len(ids) + 2
    assert both.usage.completion_tokens == 16
    assert complete(client, prompt=ids).choices[0].text == both.choices[0].text
    assert complete(client, prompt=[ids]).choices[0].text == both.choices[0].text
    streamed = {0: "", 1: ""}
    for piece in complete(client, prompt=[PROMPT, "w7"], stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in both.choices]


def test_fields_that_change_nothing_are_accepted(client):
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=2,
        temperature=0,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        n=1,
    )
    assert answer.choices[0].text == complete(client, n=2).choices[0].text
    answer = chat(client, n=2, store=False, user="me", response_format={"type": "text"})
    assert answer.choices[0].finish_reason == "length"


# Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"pack": "sad"}, "Got the pack 'sad', but expected one that this server holds: happy"),
        ({"pack": "happy", "strength": 0}, "Got steering.strength=0"),
        ({"pack": "happy", "strength": "much"}, "Got steering.strength='much'"),
        ({"pack": "happy", "strength": 1e300}, "stay finite in float32"),
        ({"pack": "happy", "colour": 1}, "unknown field steering.colour"),
        ([HAPPY, {"pack": "happy", "positions": "some"}], r"Got steering\[1\].positions='some'"),
        ("happy", "Got steering='happy', but expected an object"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_steering_is_answered_with_the_reason(client, steering, message, streamed):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        complete(client, steering=steering, stream=streamed)
    assert caught.value.param == "steering"
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "Got temperature=-1, but it should be greater"),
        ({"top_p": 0}, "top_p", "Got top_p=0"),
        ({"max_tokens": 0}, "max_tokens", "Got max_tokens=0"),
        ({"extra_body": {"n": 2}}, "n", "Got n=2, but it should be left out"),
        ({"echo": True}, "echo", "Got echo=True, but it should be left out"),
        ({"stop": [""]}, "stop", "Got an empty stop string"),
        ({"prompt": 3}, "prompt", "Got prompt=3"),
        ({"prompt": []}, "prompt", "Got a prompt without tokens"),
        ({"prompt": [5, 100]}, "prompt", "Got the token id 100, but expected 0 to 99"),
        ({"seed": 2**63}, "seed", "Got seed="),
        ({"extra_body": {"colour": 1}}, "colour", "Got the unknown field colour, but expected"),
    ],
)
def test_bad_completions_are_refused(client, options, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        complete(client, **options)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"messages": []}, "messages", "Got messages=\\[\\]"),
        ({"messages": [{"role": "cook", "content": "w1"}]}, "messages", r"Got messages\[0\].role"),
        ({"messages": [{"role": "user"}]}, "messages", r"Got no messages\[0\].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages",
            r"messages\[0\].content",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "it should be left out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "it should be left out"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "Got top_logprobs=21"),
    ],
)
def test_bad_chats_are_refused(client, options, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        chat(client, **options)
    assert caught.value.param == param


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="Got the model 'gpt-4o', but expected 'tiny'"):
        complete(client, model="gpt-4o")


def test_a_text_longer_than_the_context_is_refused(client):
    for options in ({"prompt": [7] * 100_000}, {"n": 100_000}):
        with pytest.raises(openai.BadRequestError, match="holds 100000") as caught:
            complete(client, **options)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "prompt"
