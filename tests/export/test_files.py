"""Files of other programs, read back by those programs or by their rules."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expertsteer.errors import ExpertSteerError, ModelError, PackError, ParameterError
from expertsteer.evaluation.harness import SteeredHarnessModel
from expertsteer.export import FORMATS, export_pack
from expertsteer.vectors import load_vector
from helpers import STRENGTH, contents, greedy, logits, pack_for, random_ids

TEXTS = [("w1 w2 w3 w4", " w5"), ("w9 w8", " w7 w6 w5"), ("w20", " w21"), ("w3 w3 w30 w31", " w2")]


# gguf -----------------------------------------------------------------------------------


def test_a_control_vector_holds_strength_times_norm_times_vector(pack, tmp_path):
    path = export_pack(pack, tmp_path / "happy", "gguf", strength=-0.25).path
    assert path.name == "happy.gguf"
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert set(found) == {"direction.1", "direction.2"}  # 0-based blocks, as repeng counts
    for layer in (1, 2):
        expected = -0.25 * pack.mean_residual_norms[layer] * pack.vectors[layer]
        torch.testing.assert_close(found[f"direction.{layer}"], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="calls llama.cpp as built for Linux")
def test_llama_cpp_reads_the_file_as_it_is_meant(pack, tmp_path):
    from llama_cpp import load_control_vector

    rows = load_control_vector(export_pack(pack, tmp_path / "happy", "gguf").path)
    # Its first row is for block 1.
    for layer, vector in pack.scaled_vectors().items():
        assert torch.equal(torch.tensor(rows[layer - 1]), vector)


def test_block_0_cannot_be_exported(llama, tmp_path):
    with pytest.raises(PackError, match=r"layer 0.*llama\.cpp.*another format"):
        export_pack(pack_for(llama), tmp_path / "happy", "gguf")
    assert contents(tmp_path) == {}


# lm-eval --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_the_harness_own_model_scores_as_ours(family, saved, tmp_path):
    model = saved(family)
    path = export_pack(pack_for(model), tmp_path / "happy", "lm-eval").path
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in TEXTS]
    theirs = SteeredModel(
        pretrained=model.name,
        tokenizer=model.tokenizer,
        steer_path=str(path),
        device="cpu",
        dtype="float32",
        batch_size=1,
    )
    ours = SteeredHarnessModel(model, pack=pack_for(model))
    plain = SteeredHarnessModel(model)
    answers = [
        torch.tensor([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
        for lm in (theirs, ours, plain)
    ]
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)
    assert (answers[0] - answers[2]).abs().min() > 0.01


def test_the_harness_file_holds_plain_tensors(pack, tmp_path):
    path = export_pack(pack, tmp_path / "happy", "lm-eval", strength=0.3).path
    assert path.name == "happy.pt"
    hooks = torch.load(path, weights_only=True)
    assert set(hooks) == {"layers.1", "layers.2"}
    for layer, vector in pack.scaled_vectors(0.3).items():
        hook = hooks[f"layers.{layer}"]
        assert torch.equal(hook.pop("steering_vector"), vector)
        expected = {"action": "add", "steering_coefficient": 1.0, "bias": None, "head_index": None}
        assert hook == expected


def test_an_architecture_with_code_of_its_own(pack, tmp_path):
    import dataclasses

    odd = dataclasses.replace(pack, target=dataclasses.replace(pack.target, model_type="my-own"))
    with pytest.raises(ModelError, match=r"'my-own'.*expertsteer-lm-eval"):
        export_pack(odd, tmp_path / "happy", "lm-eval")


# peft -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "lfm2"]
)
def test_an_adapter_gives_the_logits_under_hooks(family, saved, tmp_path):
    model = saved(family)
    path = export_pack(pack_for(model), tmp_path / "adapter", "peft").path
    base = AutoModelForCausalLM.from_pretrained(model.name)
    adapted = PeftModel.from_pretrained(base, path).eval()
    ids = random_ids(2, 12)
    with pack_for(model).apply(model):
        expected, tokens = logits(model.model, ids), greedy(model.model, ids)
    torch.testing.assert_close(logits(adapted, ids), expected, rtol=1e-4, atol=1e-4)
    assert greedy(adapted, ids) == tokens
    assert (logits(model.model, ids) - expected).abs().max() > 0.1
    assert json.loads((path / "steering.json").read_text())["exported_strength"] == STRENGTH


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "mixtral"])
def test_an_architecture_that_no_adapter_fits(family, saved, tmp_path):
    model = saved(family)
    with pytest.raises(ModelError, match=rf"'{family}'.*layers 0, 1.*--to gguf"):
        export_pack(pack_for(model), tmp_path / "adapter", "peft")
    assert contents(tmp_path) == {}


# Plain arrays ---------------------------------------------------------------------------


def test_arrays_are_what_is_added(pack, tmp_path):
    tensors = load_file(export_pack(pack, tmp_path / "a", "torch").path)
    with np.load(export_pack(pack, tmp_path / "b", "numpy").path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert set(tensors) == set(arrays) == {"1", "2"}
    for layer, vector in pack.scaled_vectors().items():
        assert torch.equal(tensors[str(layer)], vector)
        assert np.array_equal(arrays[str(layer)], vector.numpy())
    for beside in ("a.json", "b.json"):
        description = json.loads((tmp_path / beside).read_text())
        assert description["exported_strength"] == STRENGTH
        assert description["target"]["width"] == pack.target.width
        assert description["mean_residual_norms"] == {"1": 7.0, "2": 8.0}


def test_one_exported_vector_can_be_carried_to_another_model(pack, tmp_path):
    path = export_pack(pack.restrict([2]), tmp_path / "a", "torch").path
    assert torch.equal(load_vector(path), pack.scaled_vectors()[2])


# Bad input ------------------------------------------------------------------------------


def test_unknown_format(pack, tmp_path):
    with pytest.raises(ParameterError, match=r"to='onnx'.*gguf, lm-eval, weights, peft"):
        export_pack(pack, tmp_path / "a", "onnx")


@pytest.mark.parametrize("strength", [0, float("nan"), float("inf")])
@pytest.mark.parametrize("to", FORMATS)
def test_a_strength_that_is_none(pack, tmp_path, to, strength):
    with pytest.raises(ParameterError, match="strength"):
        export_pack(pack, tmp_path / "a", to, strength=strength)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("to", FORMATS)
def test_a_place_that_cannot_be_written(pack, tmp_path, to):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExpertSteerError, match="Cannot write"):
        export_pack(pack, tmp_path / "file" / "a", to)
    assert contents(tmp_path) == {"file": b"mine"}
