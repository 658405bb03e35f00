"""vLLM's own server with the plugin, asked by the official client."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from expertsteer import SteeringPack
from vllm_helpers import MOST_TOKENS, TOLERANCE, differences

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

_PATIENCE = 900  # seconds
_MODEL = "smol"
_LENGTH = {"max_tokens": MOST_TOKENS, "temperature": 0}
_STEERINGS = [
    {"pack": "first", "strength": 0.5},
    {"pack": "first", "strength": -0.5, "positions": "generated"},
    [{"pack": "first"}, {"pack": "second", "strength": 0.3, "positions": "last"}],
    None,
]


def start(checkpoint, packs, log, *, port):
    """Start what `expertsteer serve` starts: vLLM's server takes the process's place."""
    code = (
        "from expertsteer.models import ModelSource\n"
        "from expertsteer.serving.options import ServeOptions\n"
        "from expertsteer.serving.vllm_front import serve_with_vllm\n"
        "from expertsteer.errors import ExpertSteerError\n"
        f"options = ServeOptions(ModelSource({checkpoint!r}, dtype='float32'), "
        f"{tuple(f'{name}={path}' for name, path in packs.items())!r}, port={port}, "
        f"api_key='secret', served_model_name={_MODEL!r}, engine_arguments=("
        "'--enforce-eager', '--max-model-len', '256', '--max-num-seqs', '8', "
        "'--max-num-batched-tokens', '32'))\n"
        "try:\n    serve_with_vllm(options)\n"
        "except ExpertSteerError as error:\n    raise SystemExit(f'Error: {error}')\n"
    )
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT, env=environment
    )


@pytest.fixture(scope="module")
def client(checkpoint, packs, tmp_path_factory):
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = start(checkpoint, packs, file, port=port)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0, timeout=300
    )
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            client.models.list()
            break
        except openai.APIConnectionError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(1)
    yield client
    process.terminate()
    assert process.wait(60) == 0


def complete(client, prompt, steering, **others):
    # Of fixed length, as the reference's answers.
    body = {"min_tokens": MOST_TOKENS}
    if steering is not None:
        body["steering"] = steering
    return client.completions.create(
        model=_MODEL, prompt=prompt, extra_body=body, **_LENGTH, **others
    )


def check_answer(completion, target, expected):
    tokens, logprobs = expected
    choice = completion.choices[0]
    assert choice.text == target.tokenizer.decode(tokens)
    found = choice.logprobs.token_logprobs
    difference = max(abs(a - b) for a, b in zip(found, logprobs, strict=True))
    assert difference < TOLERANCE
    differences.append(difference)


@pytest.mark.parametrize("steering", _STEERINGS, ids=["one", "generated", "several", "none"])
def test_completions(client, target, prompts, reference, steering):
    completion = complete(client, prompts[0], steering, logprobs=1)
    check_answer(completion, target, reference(prompts[0], steering))


def test_a_stream(client, target, prompts, reference):
    chunks = list(complete(client, prompts[0], _STEERINGS[0], stream=True))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == target.tokenizer.decode(reference(prompts[0], _STEERINGS[0])[0])


def test_chat_and_responses(client, target, reference):
    turns = [{"role": "user", "content": "How was your holiday?"}]
    prompt = target.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    said = []
    for steering in (_STEERINGS[0], None):
        body = {"min_tokens": MOST_TOKENS} | ({"steering": steering} if steering else {})
        chat = client.chat.completions.create(
            model=_MODEL, messages=turns, extra_body=body, **_LENGTH
        )
        said.append(chat.choices[0].message.content)
        expected = reference(list(prompt), steering)[0]
        assert said[-1] == target.tokenizer.decode(expected, skip_special_tokens=True)
    assert said[0] != said[1]
    response = client.responses.create(
        model=_MODEL,
        input=turns[0]["content"],
        max_output_tokens=MOST_TOKENS,
        temperature=0,
        extra_body={"steering": _STEERINGS[0]},
    )
    assert response.output_text
    assert said[0].startswith(response.output_text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"pack": "sad"}, "Got the pack 'sad', but expected one that this server holds: first"),
        ({"pack": "first", "strength": 0}, "Got steering.strength=0"),
        ({"pack": "first", "strength": "strong"}, "Got steering.strength='strong'"),
        ({"pack": "first", "strength": 1e38}, "finite in float32"),
        ({"pack": "first", "positions": "middle"}, "Got steering.positions='middle'"),
        ({"pack": "first", "where": "all"}, "Got the unknown field steering.where"),
        ("first", "Got steering='first'"),
    ],
)
def test_a_bad_request_is_answered_with_400(client, prompts, steering, message, stream):
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompts[0], steering, stream=stream)
    assert caught.value.status_code == 400
    assert message in caught.value.message


def test_beam_search_with_steering_is_answered_with_400(client, prompts):
    import openai

    with pytest.raises(openai.BadRequestError, match="use_beam_search"):
        client.completions.create(
            model=_MODEL,
            prompt=prompts[0],
            extra_body={"steering": _STEERINGS[0], "use_beam_search": True, "n": 2},
            **_LENGTH,
        )


def test_clients_at_once_are_steered_each_by_itself(client, target, prompts, reference):
    import openai

    def ask(number):
        if number % 8 == 7:  # garbage in between
            with pytest.raises(openai.BadRequestError):
                complete(client, prompts[0], {"pack": number})
            return
        prompt, steering = prompts[number % 4], _STEERINGS[number // 4 % 4]
        completion = complete(client, prompt, steering, logprobs=1)
        check_answer(completion, target, reference(prompt, steering))

    for number in range(16):  # transformers answers one at a time
        reference(prompts[number % 4], _STEERINGS[number // 4 % 4])
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(32)))


def test_a_pack_for_another_model_is_refused_at_start(checkpoint, packs, tmp_path):
    pack = SteeringPack.load(packs["first"])
    other = dataclasses.replace(pack, target=dataclasses.replace(pack.target, weights="0" * 16))
    path = other.save(tmp_path / "other")
    log = tmp_path / "log"
    with log.open("w") as file:
        process = start(checkpoint, {"other": path}, file, port=1)
    assert process.wait(_PATIENCE) == 1
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("Error: Cannot serve the pack 'other'")
    assert "weights f08fe50acbe8494e instead of 0000000000000000" in last
