"""What tells one model from another."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from expertsteer.errors import ModelError
from expertsteer.models import ModelDescription, describe_model, explain_mismatch
from expertsteer.models.fingerprint import weights_fingerprint
from helpers import N_LAYERS, VOCABULARY, WIDTH, tiny_model

DESCRIPTION = ModelDescription("a", None, "llama", 18, 640, 1000, "0123456789abcdef")


@pytest.fixture
def own_model():
    """Return a model that a test may change."""
    return copy.deepcopy(tiny_model("llama"))


def test_description_tells_architecture_and_name():
    found = describe_model(tiny_model("llama"), "mine", "v2")
    weights = weights_fingerprint(tiny_model("llama"))
    assert found == ModelDescription("mine", "v2", "llama", N_LAYERS, WIDTH, VOCABULARY, weights)
    assert ModelDescription(**found.to_dict()) == found


def test_name_falls_back_to_what_transformers_remembers(own_model):
    assert describe_model(own_model).name == "LlamaForCausalLM"
    own_model.config._name_or_path = "owner/name"
    assert describe_model(own_model).name == "owner/name"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fingerprint_is_the_same_in_float32_and_bfloat16(family):
    model = tiny_model(family)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert weights_fingerprint(half) == weights_fingerprint(model)


def test_fingerprint_of_a_bfloat16_checkpoint_is_the_same_in_float16(own_model):
    half = own_model.to(torch.bfloat16)
    with torch.no_grad():
        half.lm_head.weight[0] *= 1e-5  # too small for all of float16's digits
    before = weights_fingerprint(half)
    assert weights_fingerprint(half.to(torch.float16)) == before


def test_fingerprint_shows_a_slight_fine_tune(own_model):
    before = weights_fingerprint(own_model)
    with torch.no_grad():
        own_model.model.layers[1].mlp.up_proj.weight *= 1.01
    assert weights_fingerprint(own_model) != before


def test_fingerprint_shows_another_shape_of_the_same_values(own_model):
    before = weights_fingerprint(own_model)
    weight = own_model.lm_head.weight
    weight.data = weight.data.reshape(WIDTH, VOCABULARY)
    assert weights_fingerprint(own_model) != before


def test_weights_without_values_are_refused(own_model):
    own_model.lm_head.to("meta")
    with pytest.raises(
        ModelError, match=r"^Got parameter 'lm_head.weight' without values, but exp"
    ):
        weights_fingerprint(own_model)


def test_a_model_matches_itself_under_another_name():
    assert explain_mismatch(DESCRIPTION, replace(DESCRIPTION, name="b", revision="c")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 30}, "30 blocks instead of 18"),
        ({"width": 576}, "width 576 instead of 640"),
        ({"model_type": "gpt2"}, "type gpt2 instead of llama"),
        (
            {"n_layers": 30, "width": 576, "model_type": "gpt2", "weights": "f"},
            "30 blocks instead of 18, width 576 instead of 640, type gpt2 instead of llama",
        ),
        (
            {"weights": "f" * 16},
            "weights ffffffffffffffff instead of 0123456789abcdef (same shape, other values: "
            "a fine-tune, another revision or a quantised copy)",
        ),
    ],
)
def test_mismatch_says_what_differs(changes, message):
    assert explain_mismatch(DESCRIPTION, replace(DESCRIPTION, **changes)) == message


def test_shape_only_ignores_all_but_depth_and_width():
    other = replace(DESCRIPTION, model_type="gpt2", weights="f" * 16)
    assert explain_mismatch(DESCRIPTION, other, shape_only=True) is None
    narrow = replace(other, width=576)
    assert explain_mismatch(DESCRIPTION, narrow, shape_only=True) == "width 576 instead of 640"
