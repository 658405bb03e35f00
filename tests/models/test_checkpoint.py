"""A checkpoint on disk is described as the model it loads as."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertsteer.errors import ModelError
from expertsteer.models import describe_model
from expertsteer.models.checkpoint import describe_checkpoint
from helpers import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_description_is_that_of_the_model(family, dtype, tmp_path):
    model = copy.deepcopy(tiny_model(family)).to(dtype)
    model.save_pretrained(tmp_path)
    assert describe_checkpoint(tmp_path, "mine") == describe_model(model, "mine")


def test_of_several_files(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert describe_checkpoint(tmp_path, "mine") == describe_model(model, "mine")


def test_of_tied_embeddings(tmp_path):
    config = tiny_model("llama").config
    tied = type(config)(**{**config.to_dict(), "tie_word_embeddings": True})
    model = type(tiny_model("llama"))(tied)
    model.save_pretrained(tmp_path)
    assert describe_checkpoint(tmp_path, "mine") == describe_model(model, "mine")


def test_other_weights_show(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "a")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "b")
    one, other = (describe_checkpoint(tmp_path / name, "mine") for name in "ab")
    assert one != other
    assert dataclasses.replace(one, weights=other.weights) == other


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match="Cannot describe the checkpoint"):
        describe_checkpoint(tmp_path)
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"expected a checkpoint with model\.safetensors"):
        describe_checkpoint(tmp_path)


def test_tensors_of_another_shape_or_name_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].clone()
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"'model.norm.weight' of shape \(3,\)"):
        describe_checkpoint(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"without the tensor 'model.norm.weight'.*quantised"):
        describe_checkpoint(tmp_path)


def test_a_family_whose_tensors_are_renamed_is_refused(tmp_path):
    tiny_model("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"without the tensor 'lm_head.weight'.*renames"):
        describe_checkpoint(tmp_path)
