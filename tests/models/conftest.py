"""Saved models, and GGUF files written on the spot."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from transformers import PreTrainedModel

from helpers import CONTEXT, N_LAYERS, VOCABULARY, WIDTH, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved model with its tokenizer; no test changes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder that the package uses in this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(folder))
    return folder


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """Return a whole GGUF file of the tiny Qwen2 model."""
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, tiny_model("qwen2"))
    return path


def _write_gguf(path: Path, model: PreTrainedModel) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    # One token a printable character: with five others exactly the vocabulary.
    tokens = ["<bos>", "<eos>", "<unk>", "ab", "Ġ", "Ċ", *(chr(c) for c in range(33, 127))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 97)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, N_LAYERS)
    for key, value in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{kind}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
