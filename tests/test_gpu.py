"""What a GPU computes is what the CPU computes; skipped where there is none."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from expertsteer import ExpertSteer, collect_states, fit_alignment
from expertsteer.alignment import Alignment, Ridge
from expertsteer.data import LabelledExamples
from expertsteer.directions import RecursiveFeatureMachine
from expertsteer.directions import recursive_feature_machine as rfm
from expertsteer.evaluation import Request, continuation_log_likelihoods
from expertsteer.methods import METHODS, Material, method_vectors
from expertsteer.models import LanguageModel, load_model
from expertsteer.models.batches import to_device
from expertsteer.pairing import mutual_information_table
from expertsteer.pipeline import render_corpus
from expertsteer.steering import Steering
from helpers import random_ids, random_vector, tiny_model, tiny_tokenizer

n_gpus = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(n_gpus < 1, reason="no GPU on this machine")
needs_two_gpus = pytest.mark.skipif(n_gpus < 2, reason="no two GPUs on this machine")
TEXTS = [" ".join(f"w{(7 * n + k) % 90}" for k in range(1 + n % 9)) for n in range(60)]


def on(device: str, family: str = "llama") -> LanguageModel:
    model = copy.deepcopy(tiny_model(family)).to(device)
    return LanguageModel(model, tiny_tokenizer(), f"tiny-{family}")


def states(n: int = 40, n_layers: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n_layers, 24, generator=torch.Generator().manual_seed(seed))


def make_examples() -> LabelledExamples:
    rng = np.random.default_rng(0)
    answers = [f"w{rng.integers(20, 90)} w{n % 2 + 2 * rng.integers(4)}" for n in range(60)]
    return LabelledExamples(
        prompts=("",) * 60,
        answers=tuple(answers),
        labels=np.array([1, -1] * 30, dtype=np.int8),
        splits=("train",) * 40 + ("validation",) * 20,
        groups=tuple(map(str, range(60))),
    )


def close(gpu: object, cpu: object) -> None:
    torch.testing.assert_close(
        torch.as_tensor(gpu).cpu(), torch.as_tensor(cpu), rtol=1e-3, atol=1e-3
    )


def test_what_is_on_a_device_is_not_pinned(monkeypatch):
    def pin(_tensor):
        raise RuntimeError("only dense CPU tensors can be pinned")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    there = torch.zeros(2, device="meta")
    assert to_device(there, torch.device("meta")) is there


@needs_gpu
@pytest.mark.parametrize("position", ["last", "answer_mean"])
def test_states(position):
    found = [
        collect_states(on(device), TEXTS, position=position, batch_tokens=24, progress=False).values
        for device in ("cuda", "cpu")
    ]
    close(*found)


@needs_gpu
def test_layers_are_handed_out_where_the_model_is(tmp_path):
    for folder in (None, tmp_path / "states"):
        found = collect_states(on("cuda"), TEXTS, save_to=folder, progress=False)
        assert found.values.device.type == "cpu"
        assert found.layer(1).device.type == "cuda"
        assert found.rows(torch.arange(3)).layer(1).device.type == "cuda"


def test_what_is_computed_of_a_spread_model_stays_on_the_cpu():
    model = on("cpu")
    assert model.algebra_device == torch.device("cpu")
    model.blocks[0].to("meta")
    assert model.algebra_device == torch.device("cpu")


@needs_two_gpus
@pytest.mark.parametrize("position", ["last", "answer_mean"])
def test_states_of_a_model_on_two_gpus(position, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    blocks = {f"model.layers.{n}": min(n, 1) for n in range(3)}
    spread = load_model(tmp_path, device_map=places | blocks)
    found = [
        collect_states(model, TEXTS, position=position, batch_tokens=24, progress=False).values
        for model in (spread, on("cpu"))
    ]
    close(*found)


@needs_gpu
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_steered_logits(positions):
    found = []
    for device in ("cuda", "cpu"):
        model = on(device).model
        shown = {"output_logits": True, "return_dict_in_generate": True}
        with Steering(model, {0: random_vector(1), 1: random_vector(2)}, positions):
            ids = random_ids(2, 6).to(device)
            kept = model.generate(ids, do_sample=False, max_new_tokens=2, **shown)
        found.append(torch.stack(kept.logits))
    close(*found)


@needs_gpu
def test_scores_of_continuations():
    ids = random_ids(1, 20, 3)[0].tolist()
    requests = [
        Request(tuple(ids[:n]), (tuple(ids[n : n + 2]), tuple(ids[n : n + 5]))) for n in (3, 6, 9)
    ]
    found = [
        [
            score.log_likelihood
            for scores in continuation_log_likelihoods(on(device), requests, progress=False)
            for score in scores
        ]
        for device in ("cuda", "cpu")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@needs_gpu
def test_recursive_feature_machines_of_several_layers_at_once(monkeypatch):
    labels = torch.tensor([1.0, -1.0]).repeat(20)
    cpu = RecursiveFeatureMachine().fit_layers(states(), labels)
    for room in (rfm._BATCH_BYTES, 1):
        monkeypatch.setattr(rfm, "_BATCH_BYTES", room)
        gpu = RecursiveFeatureMachine().fit_layers(states().cuda(), labels)
        for one, other in zip(gpu, cpu, strict=True):
            close(one.direction_, other.direction_)


@needs_gpu
@pytest.mark.parametrize("estimator", ["gaussian", "ksg", "kernel"])
def test_mutual_information(estimator):
    both = states(), states(seed=1)
    gpu = mutual_information_table(*(values.cuda() for values in both), estimator)
    close(gpu, mutual_information_table(*both, estimator))


@needs_gpu
def test_a_pack_from_the_models_to_the_vectors():
    examples = make_examples()
    steer = ExpertSteer(strategy="same_depth", n_pairs=2)
    packs = [
        steer.fit(on(device, "gpt2"), on(device), examples, progress=False)
        for device in ("cuda", "cpu")
    ]
    assert packs[0].layers == packs[1].layers
    for layer in packs[0].layers:
        close(packs[0].vectors[layer], packs[1].vectors[layer])


# Rounding grows over the thousands of steps of the paper's optimiser.
@needs_gpu
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"expertsteer_paper"}))
def test_methods(name):
    examples = make_examples()
    found = []
    for device in ("cuda", "cpu"):
        states = [
            collect_states(model, render_corpus(examples, model), progress=False)
            for model in (on(device), on(device, "gpt2"))
        ]
        alignment = Alignment.fit(*states, [(1, 1)], Ridge(), progress=False)
        steer = ExpertSteer()
        material = Material(examples, *states, ((1, 1),), steer, alignment=alignment)
        found.append(method_vectors(name, material))
    close(found[0][1], found[1][1])


@needs_gpu
def test_an_alignment_on_plain_text():
    found = [
        fit_alignment(on(device, "gpt2"), on(device), TEXTS, progress=False)
        for device in ("cuda", "cpu")
    ]
    layer = found[1].pairs[0].expert_layer
    packs = [alignment.transfer(random_vector(), expert_layer=layer) for alignment in found]
    for place, vector in packs[1].vectors.items():
        close(packs[0].vectors[place], vector)
