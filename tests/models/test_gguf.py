"""GGUF files are converted once, whole or not at all."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from expertsteer import files
from expertsteer.errors import ExpertSteerError, ModelError
from expertsteer.models import gguf as conversion
from expertsteer.models import load_model
from helpers import random_ids, tiny_model


def _forbid_conversion(monkeypatch):
    def convert(*_arguments):
        raise AssertionError("converted again")

    monkeypatch.setattr(conversion, "_convert", convert)


def _left_behind(cache):
    return list((cache / "models").iterdir())


def test_converted_model_computes_what_the_original_does(cache, gguf_file):
    model = load_model(gguf_file)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model.model(ids).logits, tiny_model("qwen2")(ids).logits)
    assert model.model.dtype == torch.float32
    assert getattr(model.model.config, "quantization_config", None) is None
    tokens = model.tokenizer.convert_ids_to_tokens(model.tokenizer("xab c")["input_ids"])
    assert tokens == ["x", "ab", "Ġ", "c"]


def test_a_file_is_converted_once(cache, gguf_file, monkeypatch):
    first = load_model(gguf_file)
    _forbid_conversion(monkeypatch)
    assert load_model(gguf_file).description == first.description


def test_a_renamed_file_is_the_same_file_but_a_changed_one_is_not(cache, gguf_file, monkeypatch):
    folder = conversion.converted_checkpoint(gguf_file)
    _forbid_conversion(monkeypatch)
    renamed = gguf_file.rename(gguf_file.with_name("other.gguf"))
    assert conversion.converted_checkpoint(renamed) == folder
    content = bytearray(renamed.read_bytes())
    content[-1] ^= 1
    renamed.write_bytes(content)
    with pytest.raises(AssertionError, match="converted again"):
        conversion.converted_checkpoint(renamed)


@pytest.mark.parametrize(
    ("interruption", "raised"),
    [(KeyboardInterrupt, KeyboardInterrupt), (OSError, ExpertSteerError)],
)
def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(
    cache, gguf_file, monkeypatch, interruption, raised
):
    convert = conversion._convert

    def interrupted(path, folder):
        convert(path, folder)
        (folder / "tokenizer.json").unlink()
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_convert", interrupted)
        with pytest.raises(raised):
            load_model(gguf_file)
    assert _left_behind(cache) == []
    assert load_model(gguf_file).tokenizer("ab")["input_ids"]


def test_a_killed_conversion_is_not_taken_for_a_finished_one(cache, gguf_file, monkeypatch):
    # A kill leaves the scratch folder, with no chance to tidy up.
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_a, **_k: None)
        patch.setattr(files.os, "replace", lambda *_a: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            load_model(gguf_file)
    (scratch,) = _left_behind(cache)
    model = load_model(gguf_file)
    assert model.model.config._name_or_path != str(scratch)
    assert len(_left_behind(cache)) == 2


def test_the_conversion_of_another_process_is_taken(cache, gguf_file, monkeypatch):
    convert = conversion._convert

    def overtaken(path, folder):
        convert(path, folder)
        convert(path, conversion.converted_folder(conversion.file_hash(path)))

    monkeypatch.setattr(conversion, "_convert", overtaken)
    folder = conversion.converted_checkpoint(gguf_file)
    assert _left_behind(cache) == [folder]


def test_another_kind_of_file_is_refused(cache, tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_text("no model")
    with pytest.raises(ModelError, match=r"^Got .*notes.gguf, but expected a GGUF file"):
        load_model(path)
    assert not cache.exists()


@pytest.mark.parametrize("share", [0.0005, 0.05, 0.9])
def test_a_truncated_file_is_refused_and_leaves_nothing(cache, gguf_file, share):
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"^Got .*tiny.gguf, but expected a whole GGUF file"):
        load_model(gguf_file)
    assert not cache.exists()


def test_an_architecture_transformers_does_not_read_is_refused(cache, gguf_file):
    gguf_file.write_bytes(gguf_file.read_bytes().replace(b"qwen2", b"qwenX"))
    with pytest.raises(ModelError, match=r"^Got .*tiny.gguf, but expected .* can convert: .*qwenX"):
        load_model(gguf_file)
    assert _left_behind(cache) == []


def test_a_missing_package_is_named_with_its_install_command(cache, gguf_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(ModelError, match=r'package gguf .* pip install "expertsteer\[gguf\]"'):
        load_model(gguf_file)


def test_too_small_a_disk_is_told_before_converting(cache, gguf_file, monkeypatch):
    _forbid_conversion(monkeypatch)
    parameters = sum(value.numel() for value in tiny_model("qwen2").parameters())
    for free, error in ((4 * parameters, AssertionError), (4 * parameters - 1, ExpertSteerError)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("expertsteer.models.cache.shutil.disk_usage", lambda _f, u=usage: u)
        with pytest.raises(error):
            load_model(gguf_file)
