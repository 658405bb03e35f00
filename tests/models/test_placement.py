"""Models spread over devices, in part on disk, and GPUs dealt to the processes of a machine."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from expertsteer import processes
from expertsteer.errors import ModelError
from expertsteer.models import ModelSource, load_model, loading
from expertsteer.models.batches import HostCopy, to_device
from expertsteer.states import collect_states
from expertsteer.steering import Steering
from helpers import random_vector, tiny_model, tiny_tokenizer

TEXTS = [" ".join(f"w{(7 * n + k) % 90}" for k in range(1 + n % 9)) for n in range(20)]
ON_DISK = ("model.embed_tokens", "model.layers.1", "lm_head")
PARTS = (*ON_DISK, "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path):
    model = copy.deepcopy(tiny_model("llama"))
    model.config.tie_word_embeddings = request.param
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def both(checkpoint):
    """Return a model in memory and the same one with parts on disk."""
    spread = load_model(
        checkpoint, device_map={part: "disk" if part in ON_DISK else "cpu" for part in PARTS}
    )
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    return load_model(checkpoint), spread


def test_a_model_in_part_on_disk_is_the_same_model(both):
    whole, spread = both
    assert spread.description == whole.description
    assert spread.device == torch.device("cpu")


@pytest.mark.parametrize("layers", [None, [1], [0, 1]])
@pytest.mark.parametrize("position", ["last", "answer_mean"])
def test_states_of_a_model_in_part_on_disk(both, layers, position):
    whole, spread = (
        collect_states(model, TEXTS, layers=layers, position=position, progress=False).values
        for model in both
    )
    assert torch.equal(whole, spread)


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_a_model_in_part_on_disk_is_steered(both, positions):
    vectors = {1: random_vector(0), 2: random_vector(1)}
    inputs = both[0].tokenizer("w1 w2 w3", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = both[0].generate(**inputs, **options)
    found = []
    for model in both:
        with Steering(model.model, vectors, positions):
            found.append(model.generate(**inputs, **options))
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain)


def _as_process(monkeypatch, index: int, count: int, n_gpus: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    state = SimpleNamespace(num_processes=count, process_index=index, local_process_index=index)
    monkeypatch.setattr(processes, "_joined", lambda: state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    memory = {gpu: 80 for gpu in range(n_gpus)} | {"cpu": 200}
    monkeypatch.setattr(loading, "get_max_memory", lambda: memory)


def test_each_process_of_a_machine_takes_a_gpu_or_a_share_of_them(monkeypatch):
    for index, (gpu, share) in enumerate([("cuda:0", {0, 2}), ("cuda:1", {1, 3})]):
        _as_process(monkeypatch, index, 2, n_gpus=4)
        assert loading._placement(ModelSource("x", device="cuda")) == {"device_map": gpu}
        spread = loading._placement(ModelSource("x", device_map="auto"))
        assert spread == {
            "device_map": "auto",
            "max_memory": dict.fromkeys(share, 80) | {"cpu": 100},
        }
        assert loading._placement(ModelSource("x", device="cuda:3")) == {"device_map": "cuda:3"}
        assert loading._placement(ModelSource("x")) == {"device_map": None}


def test_more_processes_than_gpus_are_refused(monkeypatch):
    _as_process(monkeypatch, 2, 3, n_gpus=2)
    with pytest.raises(ModelError, match=r"^Got 2 GPUs for more processes than that"):
        loading._placement(ModelSource("x", device="cuda"))


def test_states_on_the_cpu_are_there_at_once():
    states = [torch.randn(3, 4) for _ in range(2)]
    copy_ = HostCopy(states)
    assert not copy_.is_under_way
    assert torch.equal(copy_.wait(), torch.stack(states, dim=1))


@needs_gpu
def test_states_leave_a_gpu_by_pinned_memory():
    states = [to_device(torch.randn(3, 4), torch.device("cuda")) for _ in range(2)]
    copy_ = HostCopy(states)
    assert copy_.is_under_way
    found = copy_.wait()
    assert found.device.type == "cpu"
    assert torch.equal(found, torch.stack([state.cpu() for state in states], dim=1))


@needs_gpu
def test_states_collected_on_a_gpu_are_those_of_the_cpu(checkpoint):
    cpu, gpu = (load_model(checkpoint, device=device) for device in (None, "cuda"))
    states = [collect_states(model, TEXTS, batch_tokens=24, progress=False) for model in (cpu, gpu)]
    torch.testing.assert_close(states[0].values, states[1].values, rtol=1e-4, atol=1e-4)
