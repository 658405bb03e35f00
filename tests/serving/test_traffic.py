"""Many clients, rude clients, and the end of the server."""

from __future__ import annotations

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from server_process import LONG, until

ENDLESS = {"model": "tiny", "prompt": "w1 w2", "max_tokens": LONG - 10, "temperature": 0}


def short(n: int, **steering) -> dict:
    body = {"model": "tiny", "prompt": f"w{n} w2", "max_tokens": 6, "temperature": 0}
    return body | ({"steering": steering} if steering else {})


def post(server, body, path="/completions", **options) -> httpx.Response:
    return httpx.post(server.address + path, json=body, timeout=120, **options)


def counts(server) -> tuple[int, int]:
    found = httpx.get(server.address.removesuffix("/v1") + "/health").json()
    assert found["status"] == "ok"
    return found["running"], found["waiting"]


@pytest.fixture
def busy(server):
    """Keep the server generating until the test ends."""
    stream = server.client().completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    assert counts(server) == (1, 0)
    yield stream
    stream.close()
    assert until(lambda: counts(server) == (0, 0))


GARBAGE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[" * 100_000,
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "w1", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "w1", "steering": {"pack": "happy", "strength": Infinity}}',
    b'{"model": ["tiny"], "prompt": {"w1": null}}',
]


@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: repr(body[:20]))
def test_garbage_is_answered_in_one_line(server, body):
    answer = httpx.post(
        f"{server.address}/completions",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("Got ")
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


def test_sixty_four_clients_of_whom_one_sends_garbage(server):
    ways = [{}, {"pack": "happy", "strength": 1.5}, {"pack": "formal", "strength": -2.0}]
    bodies = [short(n % 20, **ways[n % 3]) for n in range(63)]
    alone = {json.dumps(body): post(server, body).json() for body in bodies[:60]}
    assert len({answer["choices"][0]["text"] for answer in alone.values()}) > 30

    def rude(_: object) -> list[int]:
        codes = []
        for body in GARBAGE:
            url = f"{server.address}/completions"
            headers = {"Content-Type": "application/json"}
            codes.append(httpx.post(url, content=body, headers=headers, timeout=60).status_code)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(b"\x00\x01garbage\r\n\r\n")
            assert b"400" in raw.recv(100)
        return codes

    with ThreadPoolExecutor(64) as clients:
        bad = clients.submit(rude, None)
        answers = list(clients.map(lambda body: post(server, body), bodies))
        assert bad.result() == [400] * len(GARBAGE)
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200
        expected = alone[json.dumps(body)]
        assert answer.json()["choices"] == expected["choices"]
        assert answer.json()["usage"] == expected["usage"]
    assert counts(server) == (0, 0)


def test_a_client_that_goes_away_frees_its_place(server, client):
    stream = client.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    stream.close()
    begun = time.monotonic()
    assert post(server, short(1)).status_code == 200
    assert time.monotonic() - begun < 30
    assert counts(server) == (0, 0)


def test_a_client_that_waits_for_a_whole_answer_may_go_too(server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.address}/completions", json=ENDLESS, timeout=1)
    assert until(lambda: counts(server) == (0, 0))


def test_clients_that_go_while_they_wait(server, busy):
    for streamed in (False, True):
        with (
            httpx.Client() as client,
            client.stream("POST", f"{server.address}/completions", json=ENDLESS | {"stream": True})
            if streamed
            else pytest.raises(httpx.ReadTimeout),
        ):
            if streamed:
                assert counts(server) == (1, 1)
            else:
                httpx.post(f"{server.address}/completions", json=ENDLESS, timeout=1)
        assert until(lambda: counts(server) == (1, 0))
    # The one that runs has not noticed.
    assert next(iter(busy)).choices[0].finish_reason is None


def test_a_full_queue_says_when_to_come_back(start, target, packs):
    server = start(
        target.name,
        f"--pack={packs['happy']}",
        "--max-queue",
        1,
        "--max-tokens-limit",
        LONG - 10,
        "--max-request-bytes",
        2000,
    )
    client = server.client()
    name = client.models.list().data[0].id
    assert name == target.name
    body = ENDLESS | {"model": name, "stream": True}
    first = client.completions.create(**body)
    next(iter(first))
    with httpx.stream("POST", f"{server.address}/completions", json=body):
        assert counts(server) == (1, 1)
        refused = post(server, short(1) | {"model": name})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        # A bad request is told so, whether or not there is a place.
        assert post(server, short(1, pack="sad") | {"model": name}).status_code == 400
    first.close()
    assert until(lambda: counts(server) == (0, 0))
    assert post(server, short(1) | {"model": name}).status_code == 200
    # The client comes back by itself.
    patient = server.client(max_retries=2)
    assert patient.completions.create(**short(1) | {"model": name}).usage.completion_tokens == 6

    with pytest.raises(openai.APIStatusError, match="more than 2000 bytes") as caught:
        client.completions.create(model=name, prompt="w1 " * 10_000)
    assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="at most 99990 a request"):
        client.completions.create(model=name, prompt="w1", max_tokens=LONG - 9)


def test_wrong_addresses_methods_and_types(server):
    root = server.address.removesuffix("/v1")
    for answer, status in (
        (httpx.get(f"{root}/nowhere"), 404),
        (httpx.get(f"{server.address}/completions"), 405),
        (httpx.post(f"{server.address}/completions", content=b"{}"), 415),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith("Got ")


def test_without_a_key_only_this_machines_names_are_answered(server):
    url = f"{server.address}/models"
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"):
        assert httpx.get(url, headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:80", "192.168.0.1"):
        answer = httpx.get(url, headers={"Host": host})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "foreign_host"


def test_with_a_key_everyone_needs_it(start, target, packs):
    server = start(
        *(target.name, f"--pack={packs['happy']}", "--host", "0.0.0.0"),
        env={"EXPERTSTEER_API_KEY": "schlüssel"},
    )
    server.address = server.address.replace("0.0.0.0", "127.0.0.1")
    root = server.address.removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic schlussel"},
    ):
        answer = httpx.get(f"{server.address}/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    right = {"Authorization": "Bearer schlüssel".encode(), "Host": b"my.example"}
    assert httpx.get(f"{server.address}/models", headers=right).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()


# The end --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends_at_once(start, target, packs, number):
    server = start(target.name, f"--pack={packs['happy']}")
    assert counts(server) == (0, 0)
    assert server.stop(number) == 0
    assert until(lambda: server.lines[-1] == "expertsteer: server stopped\n"), server.lines
    assert not any("Traceback" in line for line in server.lines)


def test_what_runs_is_finished_and_what_waits_is_refused(start, target, packs):
    server = start(target.name, f"--pack={packs['happy']}", "--served-model-name", "tiny")
    with ThreadPoolExecutor() as clients:
        body = ENDLESS | {"max_tokens": 300}
        running = clients.submit(post, server, body)
        assert until(lambda: counts(server) == (1, 0))
        waiting = clients.submit(post, server, body)
        assert until(lambda: counts(server) == (1, 1))
        assert server.stop(signal.SIGTERM) == 0
        assert running.result().json()["usage"]["completion_tokens"] == 300
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "stopped"


def test_what_runs_too_long_is_cut(start, target, packs):
    server = start(
        *(target.name, f"--pack={packs['happy']}", "--served-model-name", "tiny"),
        *("--shutdown-timeout", 1),
    )
    stream = server.client().completions.create(**ENDLESS, stream=True)
    pieces = iter(stream)
    next(pieces)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="being stopped"):
        list(pieces)
    assert server.process.wait(30) == 0
    # Left alone, it would go on for many minutes.
    assert time.monotonic() - begun < 60
