"""A checkpoint with a vector in its weights runs in stock transformers as under hooks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from expertsteer import load_model
from expertsteer.errors import ExpertSteerError, ModelError, PackError
from expertsteer.export import export_pack
from expertsteer.export.additive import find_residual_writers
from expertsteer.models import LanguageModel, find_blocks
from helpers import (
    FAMILIES,
    N_LAYERS,
    STRENGTH,
    contents,
    greedy,
    logits,
    pack_for,
    random_ids,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)

# Which architecture the checkpoint is of, and how many blocks are added for two vectors.
BIASES = {
    "llama": "llama",
    "mistral": "smollm3",  # its attention window is narrower than its context
    "qwen2": "llama",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "opt": "opt",
    "falcon": "falcon",
    "bloom": "bloom",
    "granite": "granite",
    "starcoder2": "starcoder2",
    "smollm3": "smollm3",
    "mamba": "mamba",
}
BLOCKS = ("qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo2", "stablelm", "cohere")
NEITHER = ("phi3", "mixtral", "lfm2")


def test_every_family_is_tried():
    assert {*BIASES, *BLOCKS, *NEITHER} == set(FAMILIES)


def exported(model: LanguageModel, folder, **options):
    path = export_pack(pack_for(model), folder, "weights", target=model, **options).path
    return path, AutoModelForCausalLM.from_pretrained(path).eval()


def assert_same_steering(model: LanguageModel, steered, strength=STRENGTH):
    ids = random_ids(2, 12)
    unsteered = logits(model.model, ids)
    with pack_for(model).apply(model, strength):
        expected, tokens = logits(model.model, ids), greedy(model.model, ids)
    found = logits(steered, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - unsteered).abs().max() > 100 * (found - expected).abs().max()
    assert greedy(steered, ids) == tokens
    assert tokens != greedy(model.model, ids)


@pytest.mark.parametrize("family", [*BIASES, *BLOCKS])
def test_logits_and_greedy_tokens_are_those_under_hooks(family, saved, tmp_path):
    model = saved(family)
    before = {name: t.clone() for name, t in model.model.state_dict().items()}
    path, steered = exported(model, tmp_path / "out")
    assert_same_steering(model, steered)
    assert steered.config.model_type == BIASES.get(family, family)
    assert len(find_blocks(steered)) == N_LAYERS + (2 if family in BLOCKS else 0)
    assert steered.dtype == torch.float32
    assert (path / "tokenizer.json").is_file()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family", NEITHER)
def test_an_architecture_that_cannot_hold_a_vector(family, saved, tmp_path):
    model = saved(family)
    with pytest.raises(ModelError, match=rf"type '{family}', whose weights cannot.*--to gguf"):
        exported(model, tmp_path / "out")
    assert contents(tmp_path) == {}


def test_all_biases_but_the_vectors_are_zero(saved, tmp_path):
    model = saved("qwen2")
    path, steered = exported(model, tmp_path / "out")
    own = model.model.state_dict()
    vectors = pack_for(model).scaled_vectors()
    for name, tensor in steered.state_dict().items():
        if name in own:
            assert torch.equal(tensor, own[name])
        elif name.endswith("mlp.down_proj.bias") and int(name.split(".")[2]) in vectors:
            assert torch.equal(tensor, vectors[int(name.split(".")[2])])
        else:
            assert name.endswith(".bias")
            assert not tensor.any()
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    record = json.loads((path / "steering.json").read_text())
    assert record["exported_strength"] == STRENGTH
    assert record["layers"] == [0, 1]


def test_mistral_without_a_window_becomes_llama(saved, tmp_path):
    config = copy.deepcopy(tiny_model("mistral").config)
    config.sliding_window = None
    inner = AutoModelForCausalLM.from_config(config).eval()
    inner.load_state_dict(tiny_model("mistral").state_dict())
    model = LanguageModel(inner, tiny_tokenizer(), "windowless")
    _, steered = exported(model, tmp_path / "out")
    assert steered.config.model_type == "llama"
    assert_same_steering(model, steered)


def test_a_narrow_window_stays_where_texts_are_longer(saved, tmp_path):
    model = saved("mistral")
    _, steered = exported(model, tmp_path / "out")
    ids = random_ids(1, 40)  # the window is 8
    with pack_for(model).apply(model):
        expected = logits(model.model, ids)
    torch.testing.assert_close(logits(steered, ids), expected, rtol=1e-4, atol=1e-4)


def variant(family: str, **settings) -> LanguageModel:
    config = copy.deepcopy(tiny_model(family).config)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    inner = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return LanguageModel(inner, tiny_tokenizer(), f"a-{family}")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_tied_embeddings_stay_tied(family, tmp_path):
    model = variant(family, tie_word_embeddings=True)
    path, steered = exported(model, tmp_path / "out")
    assert steered.config.tie_word_embeddings
    assert steered.get_input_embeddings().weight is steered.get_output_embeddings().weight
    with safe_open(path / "model.safetensors", "pt") as file:
        assert not any("lm_head" in name for name in file.keys())  # noqa: SIM118
    assert_same_steering(model, steered)


def test_a_block_that_scales_what_it_adds(tmp_path):
    model = variant("granite", residual_multiplier=0.4)
    assert find_residual_writers(model, [1])[1].factor == pytest.approx(0.4, rel=1e-4)
    _, steered = exported(model, tmp_path / "out")
    assert_same_steering(model, steered)


def test_the_tokenizer_survives_the_change_of_architecture(saved, tmp_path):
    text = "Hello  world 2024, it's\n\n a naïve café"
    trained = Qwen2Tokenizer().train_new_from_iterator([text] * 20, 300)
    model = LanguageModel(saved("qwen2").model, trained, saved("qwen2").name)
    path, _ = exported(model, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(path)(text).input_ids
    assert ids == trained(text).input_ids
    assert trained.decode(ids) == text


def test_rotary_scaling_goes_along(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    model = variant("qwen2", rope_parameters=rope)
    _, steered = exported(model, tmp_path / "out")
    assert steered.config.rope_parameters == rope
    assert_same_steering(model, steered)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_float_type_stays(family, tmp_path):
    whole = tiny_language_model(family)
    inner = copy.deepcopy(whole.model).to(torch.bfloat16)
    model = LanguageModel(inner, tiny_tokenizer(), whole.name)
    path, steered = exported(model, tmp_path / "out")
    assert steered.dtype == torch.bfloat16
    with safe_open(path / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    ids = random_ids(1, 12)
    unsteered = logits(inner, ids).float()
    with pack_for(model).apply(model):
        expected = logits(inner, ids).float()
    found = logits(steered, ids).float()
    # Sums are rounded in another order; what steering changes is far more than that.
    assert (found - expected).abs().mean() < 0.05 * (expected - unsteered).abs().mean()


def test_generation_settings_go_along(saved, tmp_path):
    model = variant("llama")
    model.model.generation_config.repetition_penalty = 1.3
    path, steered = exported(model, tmp_path / "out")
    assert steered.generation_config.repetition_penalty == 1.3
    assert (path / "generation_config.json").is_file()


def test_an_exported_checkpoint_can_be_steered_again(saved, tmp_path):
    model = saved("llama")
    path, _ = exported(model, tmp_path / "out")
    again = load_model(str(path))
    path, twice = exported(again, tmp_path / "twice")
    assert twice.config.model_type == "llama"
    assert_same_steering(model, twice, strength=2 * STRENGTH)


# Bad input ------------------------------------------------------------------------------


def test_a_quantised_model_is_refused(tmp_path):
    model = variant("llama")
    model.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\).*unquantised"):
        exported(model, tmp_path / "out")
    assert contents(tmp_path) == {}


def test_a_folder_that_is_there(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ExpertSteerError, match=r"holds something.*--overwrite"):
        exported(llama, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    path, steered = exported(llama, tmp_path / "out", overwrite=True)
    assert not (path / "notes.txt").exists()
    assert_same_steering(llama, steered)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_folders_place(llama, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExpertSteerError, match="it is a file"):
        exported(llama, tmp_path / "out", overwrite=True)


def test_a_pack_for_another_model(saved, llama, tmp_path):
    other = variant("llama")
    with pytest.raises(PackError, match="same shape"):
        export_pack(pack_for(llama), tmp_path / "out", "weights", target=other)
    export_pack(pack_for(llama), tmp_path / "out", "weights", target=other, force=True)
    with pytest.raises(PackError, match="type qwen2 instead of llama"):
        export_pack(pack_for(llama), tmp_path / "b", "weights", target=saved("qwen2"))


def test_a_checkpoint_that_would_compute_something_else_is_not_written(
    llama, tmp_path, monkeypatch
):
    from expertsteer.export import rebuilding

    monkeypatch.setattr(rebuilding, "_with_biases", lambda state, _: dict(state))
    monkeypatch.setattr(rebuilding, "_set_adding", lambda *_: None)
    with pytest.raises(ModelError, match="cannot hold"):
        exported(llama, tmp_path / "out")
    assert contents(tmp_path) == {}


def test_the_pack_names_the_target(saved, tmp_path):
    model = saved("llama")
    assert AutoConfig.from_pretrained(model.name).model_type == "llama"
    path = export_pack(pack_for(model), tmp_path / "out", "weights").path
    assert_same_steering(model, AutoModelForCausalLM.from_pretrained(path).eval())
