"""llama.cpp with an exported control vector computes what transformers does under hooks.

llama.cpp multiplies with activations of 8 bits, so that even unsteered its log-probabilities
differ from those of the same weights, dequantised, in transformers. Steered they must differ
no more than that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from expertsteer import SteeringPack, load_model
from expertsteer.data import load_plain_text, sentence_beginnings
from expertsteer.export import export_pack
from expertsteer.models import EMBEDDED_MODELS
from expertsteer.states import collect_states

pytestmark = [
    pytest.mark.integration,
    pytest.mark.xdist_group("real models"),
    pytest.mark.skipif(sys.platform != "linux", reason="calls llama.cpp as built for Linux"),
]

NAME = "smollm2-135m-instruct"
LAYERS = (1, 14, 29)  # the first that a control vector can steer, and the last
STRENGTH = -0.2
PROMPTS = ("My neighbour told me that her holiday was", "The capital of France is")
N_NEW = 8


@pytest.fixture(scope="module")
def model():
    return load_model(NAME, dtype="float32")


@pytest.fixture(scope="module")
def checkpoint():
    ((package, file),) = EMBEDDED_MODELS[NAME].files
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    return Path(folder) / file


@pytest.fixture(scope="module")
def engine(checkpoint):
    from llama_cpp import LlamaCpp

    engine = LlamaCpp(checkpoint)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def pack(model):
    """Steer from sad to happy sentences, by the difference of a few states."""
    sides = [
        ["I love this, what a wonderful happy day", "That was great and lovely"],
        ["I hate this, what a horrible sad day", "That was awful and nasty"],
    ]
    happy, sad = (collect_states(model, side, layers=LAYERS, progress=False) for side in sides)
    plain = sentence_beginnings(load_plain_text(), 40)
    states = collect_states(model, plain, layers=LAYERS, progress=False)
    differences = {j: (happy.layer(j) - sad.layer(j)).mean(0) for j in LAYERS}
    return SteeringPack(
        vectors={j: d / d.norm() for j, d in differences.items()},
        mean_residual_norms={j: states.mean_residual_norm(j) for j in LAYERS},
        target=model.description,
        strength=STRENGTH,
    )


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize(
    ("layers", "prompt"),
    [((1,), PROMPTS[0]), ((14,), PROMPTS[1]), ((29,), PROMPTS[0]), (LAYERS, PROMPTS[1])],
)
def test_same_steering_as_under_hooks(model, engine, pack, tmp_path, layers, prompt):
    pack = pack.restrict(layers)
    path = export_pack(pack, tmp_path / "vector", "gguf").path
    prompt_ids = model.tokenizer(prompt).input_ids
    with pack.apply(model):
        ids = model.generate(
            input_ids=torch.tensor([prompt_ids]), max_new_tokens=N_NEW, do_sample=False
        )[0].tolist()
        steered = log_probabilities(model, ids)
    unsteered = log_probabilities(model, ids)
    engine.steer(None)
    unsteered_there = engine.log_probabilities(ids)
    engine.steer(path)
    steered_there = engine.log_probabilities(ids)

    by_quantisation = (unsteered_there - unsteered).abs().mean()
    difference = (steered_there - steered).abs().mean()
    effect = (steered - unsteered).abs().mean()
    print(
        f"\n{layers} {prompt!r}: unsteered {by_quantisation:.4f}, steered {difference:.4f}, "
        f"effect {effect:.4f}"
    )
    assert difference < 2 * by_quantisation + 0.01
    # What steering changes, it changes there as well.
    assert (steered_there - unsteered_there - (steered - unsteered)).abs().mean() < 0.5 * effect

    # Greedy tokens, wherever the best two are further apart than quantisation moves them.
    new = slice(len(prompt_ids) - 1, len(ids) - 1)
    best = steered[new].topk(2).values
    is_clear = best[:, 0] - best[:, 1] > 2 * by_quantisation
    assert is_clear.sum() >= 3
    agrees = steered_there[new].argmax(-1) == steered[new].argmax(-1)
    assert agrees[is_clear].all()


def test_one_block_off_would_show(model, engine, pack, tmp_path):
    pack = pack.restrict([14])
    path = export_pack(pack, tmp_path / "vector", "gguf").path
    ids = model.tokenizer(PROMPTS[0]).input_ids
    engine.steer(path)
    there = engine.log_probabilities(ids)

    def distance(layer: int) -> float:
        moved = SteeringPack(
            {layer: pack.vectors[14]}, {layer: pack.mean_residual_norms[14]}, pack.target
        )
        with moved.apply(model, STRENGTH):
            return float((log_probabilities(model, ids) - there).abs().mean())

    assert distance(14) < min(distance(13), distance(15))


SERVER = os.environ.get("LLAMA_SERVER")


@contextmanager
def running_server(*arguments):
    """Start llama.cpp's server on loopback and return a function that asks it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [SERVER, "--host", "127.0.0.1", "--port", str(port), "--offline", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        for _ in range(120):
            assert process.poll() is None, "the server ended"
            try:
                ask("/health")
                break
            except OSError:  # not there yet, or loading
                time.sleep(0.5)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(not SERVER, reason="LLAMA_SERVER names no llama-server program")
def test_the_server_with_an_exported_control_vector(model, pack, checkpoint, tmp_path):
    path = export_pack(pack, tmp_path / "vector", "gguf").path
    prompt_ids = model.tokenizer(PROMPTS[0]).input_ids

    def ask_server(*arguments):
        """Return the tokens that a server writes, and their log-probabilities there."""
        with running_server("--model", str(checkpoint), *arguments) as ask:
            body = {"prompt": prompt_ids, "n_predict": N_NEW, "temperature": 0.0, "n_probs": 1}
            written = ask("/completion", body)["completion_probabilities"]
        return [token["id"] for token in written], torch.tensor([t["logprob"] for t in written])

    def distance(ids, there):
        """Return how far its log-probabilities are from those of transformers."""
        table = log_probabilities(model, prompt_ids + ids)
        here = table[torch.arange(len(ids)) + len(prompt_ids) - 1, torch.tensor(ids)]
        return float((there - here).abs().mean())

    unsteered_ids, unsteered_there = ask_server()
    ids, there = ask_server("--control-vector", str(path))
    unsteered = distance(unsteered_ids, unsteered_there)
    with pack.apply(model):
        steered = distance(ids, there)
    without_hooks = distance(ids, there)
    print(f"\nunsteered {unsteered:.4f}, steered {steered:.4f}, effect {without_hooks:.4f}")
    assert ids != unsteered_ids
    assert steered < 2 * unsteered + 0.01
    assert steered < 0.1 * without_hooks
