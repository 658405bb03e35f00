"""Which models are refused, and what is found inside wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from expertsteer.errors import ModelError
from expertsteer.models import block_output, check_layers, find_blocks, unwrap
from helpers import N_LAYERS, tiny_model

BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}


@pytest.fixture
def own_model() -> PreTrainedModel:
    """Return a model that a test may change."""
    return copy.deepcopy(tiny_model("llama"))


@pytest.mark.parametrize(
    ("family", "settings", "kind"),
    [("bert", BERT, "encoder-only"), ("t5", T5, "encoder-decoder")],
)
def test_encoders_are_refused(family, settings, kind):
    model = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    with pytest.raises(ModelError, match=rf"^Got the {kind} model '{family}', but expected .* one"):
        find_blocks(model)


def test_bert_as_a_decoder_is_accepted():
    config = AutoConfig.for_model("bert", **BERT, is_decoder=True)
    assert len(find_blocks(AutoModelForCausalLM.from_config(config))) == 2


def test_compiled_model_is_unwrapped():
    model = tiny_model("llama")
    assert unwrap(torch.compile(model)) is model


def test_peft_model_is_unwrapped_compiled_or_not(own_model):
    wrapped = get_peft_model(own_model, LoraConfig(target_modules=["q_proj"], r=2))
    for outer in (wrapped, torch.compile(wrapped)):
        assert find_blocks(outer) is own_model.model.layers


def test_anything_but_a_transformers_model_is_refused():
    with pytest.raises(ModelError, match=r"^Got a Linear, but expected .*AutoModelForCausalLM"):
        find_blocks(nn.Linear(2, 2))


def test_two_lists_of_the_right_length_are_refused(own_model):
    own_model.model.towers = nn.ModuleList(nn.Identity() for _ in range(N_LAYERS))
    with pytest.raises(ModelError, match=f"LlamaForCausalLM with 2 lists of {N_LAYERS} blocks"):
        find_blocks(own_model)


def test_a_list_inside_a_block_is_not_a_second_one(own_model):
    own_model.model.layers[0].experts = nn.ModuleList(nn.Identity() for _ in range(N_LAYERS))
    assert find_blocks(own_model) is own_model.model.layers


def test_no_list_of_blocks_is_refused(own_model):
    own_model.model.layers = nn.Sequential(*own_model.model.layers)
    with pytest.raises(ModelError, match=f"with 0 lists of {N_LAYERS} blocks, but expected"):
        find_blocks(own_model)


def test_block_output_keeps_all_rows_of_tensors_and_tuples():
    hidden = torch.zeros(4, 5, 6)
    assert block_output(hidden) is hidden
    assert block_output((hidden, None)) is hidden


@pytest.mark.parametrize(
    ("output", "shown"), [(torch.zeros(5, 6), r"\(5, 6\)"), ({"hidden": 1}, "dict"), ((), "tuple")]
)
def test_other_block_outputs_are_refused(output, shown):
    with pytest.raises(ModelError, match=f"Got a block output of {shown}, but expected a .batch"):
        block_output(output)


def test_layers_are_sorted_and_none_means_all():
    assert check_layers((2, 0), 3, "tiny") == (0, 2)
    assert check_layers(None, 3, "tiny") == (0, 1, 2)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 3], r"Got layer 3, but expected 0 to 2. tiny has 3 blocks"),
        ([-1], r"Got layer -1, but expected 0 to 2"),
        ([], r"Got layers \[\], but expected at least one, each once"),
        ([1, 1], r"Got layers \[1, 1\], but expected at least one, each once"),
    ],
)
def test_wrong_layers_are_refused(layers, message):
    with pytest.raises(ModelError, match=message):
        check_layers(layers, 3, "tiny")
