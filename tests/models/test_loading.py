"""Loading from a folder: what passes through, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from expertsteer.errors import ModelError
from expertsteer.models import EMBEDDED_MODELS, LanguageModel, ModelSource, load_model
from helpers import CONTEXT, tiny_language_model, tiny_model, tiny_tokenizer


@pytest.fixture
def own_checkpoint(checkpoint, tmp_path) -> Path:
    """Return a saved model that a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", [str, Path, lambda path: ModelSource(str(path))])
def test_a_folder_is_loaded_whole(checkpoint, kind):
    model = load_model(kind(checkpoint))
    original = tiny_model("llama")
    assert model.name == str(checkpoint)
    assert not model.model.training
    for (name, value), (_, expected) in zip(
        model.model.named_parameters(), original.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name
    assert model.tokenizer("w0 w1")["input_ids"] == tiny_tokenizer()("w0 w1")["input_ids"]


def test_a_loaded_model_is_returned_as_it_is():
    model = tiny_language_model("llama")
    assert load_model(model) is model


def test_dtype_and_attention_pass_through(checkpoint):
    model = load_model(checkpoint, dtype="bfloat16", attn_implementation="eager")
    assert model.model.dtype == torch.bfloat16
    assert model.model.config._attn_implementation == "eager"
    assert load_model(checkpoint, dtype=torch.float16).model.dtype == torch.float16


@pytest.mark.parametrize("option", [{"device": "meta"}, {"device_map": {"": "meta"}}])
def test_device_passes_through(checkpoint, option):
    # "meta" is a device that every machine has and that is not the default.
    assert load_model(checkpoint, **option).device == torch.device("meta")
    assert load_model(checkpoint).device == torch.device("cpu")


def test_automatic_dtype_is_the_checkpoints_own(tmp_path, own_checkpoint):
    load_model(own_checkpoint, dtype="float16").model.save_pretrained(own_checkpoint)
    assert load_model(own_checkpoint).model.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "^Got dtype='int8', but expected one of auto, fastest, float32"),
        ({"device": "cpu", "device_map": "auto"}, "^Got both device and device_map, but expected"),
        ({"device": "nowhere"}, "but expected one that transformers can load: .*nowhere"),
        ({"attn_implementation": "none"}, "but expected one that transformers can load: .*none"),
    ],
)
def test_wrong_options_are_refused(checkpoint, options, message):
    with pytest.raises(ModelError, match=message):
        load_model(checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_told_as_an_error_of_the_model(checkpoint):
    with pytest.raises(ModelError, match=r"^Got the model .*, but expected one .* load: .*CUDA"):
        load_model(checkpoint, device="cuda:0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "^Got the model './missing', but expected a folder that exists. Check"),
        ("/a/b/c", "^Got the model '/a/b/c', but expected a folder that exists"),
        ("a/b/c", "^Got the model 'a/b/c', but expected a folder that exists"),
        ("missing.gguf", "^Got the model 'missing.gguf', but expected a file that exists. Check"),
    ],
)
def test_missing_places_are_refused_without_asking_the_hub(name, message):
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_unknown_short_name_lists_the_embedded_ones():
    with pytest.raises(
        ModelError, match=r"^Got the model 'gemma', but expected a hub id"
    ) as caught:
        load_model("gemma")
    assert all(name in str(caught.value) for name in EMBEDDED_MODELS)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_folder_without_a_part_is_refused(own_checkpoint, lost):
    (own_checkpoint / lost).unlink()
    with pytest.raises(ModelError, match=r"^Got the model .*/own', but expected one that transfor"):
        load_model(own_checkpoint)


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_part_is_refused_in_one_line(own_checkpoint, damaged):
    path = own_checkpoint / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"^Got the model .*/own', but expected") as caught:
        load_model(own_checkpoint)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_refused(own_checkpoint):
    for path in own_checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"^Got the model .*/own', but expected .*tokenizer"):
        load_model(own_checkpoint)


def test_an_encoder_is_refused_when_it_is_loaded(tmp_path):
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^Got the encoder-only model 'bert'"):
        load_model(tmp_path)


def test_code_that_comes_with_a_model_runs_only_on_request(own_checkpoint, monkeypatch, tmp_path):
    ran = tmp_path / "ran"
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    (own_checkpoint / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
    )
    _edit_json(
        own_checkpoint / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    with pytest.raises(ModelError, match=r"^Got the model .*trust_remote_code"):
        load_model(own_checkpoint)
    assert not ran.exists()
    model = load_model(own_checkpoint, trust_remote_code=True)
    assert ran.exists()
    assert type(model.model).__name__ == "OwnForCausalLM"


def test_a_tokenizer_without_padding_pads_with_its_end(own_checkpoint):
    config = own_checkpoint / "tokenizer_config.json"
    _edit_json(config, pad_token=None)
    assert load_model(own_checkpoint).pad_token_id == 2


def test_without_any_padding_token_any_token_serves():
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.pad_token = None
    assert LanguageModel(tiny_model("llama"), tokenizer, "tiny").pad_token_id == 0


def test_context_is_the_smaller_of_model_and_tokenizer():
    model = tiny_language_model("llama")
    assert model.context_length == CONTEXT
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.model_max_length = 10
    assert replace(model, tokenizer=tokenizer).context_length == 10


def test_chat_prompt_ends_where_the_answer_begins():
    model = tiny_language_model("llama", chat=True)
    turns = [{"role": "user", "content": "w1 w2"}]
    assert model.chat_prompt(turns) == "<user> w1 w2 <eos> <assistant>"


def test_chat_prompt_without_a_template_is_refused():
    with pytest.raises(ModelError, match=r"^Got a chat for tiny-llama, but expected .* Leave the"):
        tiny_language_model("llama").chat_prompt([{"role": "user", "content": "w1"}])


def test_generate_returns_the_greedy_continuation():
    model = tiny_language_model("llama")
    inputs = model.tokenizer("w1 w2 w3", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model.model(output[:, :-1]).logits[0, 3:]
    logits[:, 2] = float("-inf")  # the end was forbidden
    assert torch.equal(output[0, 4:], logits.argmax(-1))


def test_loading_leaves_progress_bars_as_they_were(checkpoint):
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    load_model(checkpoint)
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        load_model(checkpoint)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_weights_that_memory_cannot_hold_are_foreseen(checkpoint, monkeypatch):
    needed = sum(p.numel() for p in tiny_model("llama").parameters())
    free = type("Memory", (), {"available": 3 * needed})
    monkeypatch.setattr("expertsteer.models.loading.psutil.virtual_memory", lambda: free)
    with pytest.raises(ModelError, match=r"free memory.*bfloat16"):
        load_model(checkpoint, dtype="float32")
    assert load_model(checkpoint, dtype="bfloat16").model.dtype == torch.bfloat16
