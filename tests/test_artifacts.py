"""Telling whatever was saved."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from expertsteer import Alignment, SteeringPack, collect_states
from expertsteer.affine import Affine
from expertsteer.artifacts import describe_artifact
from expertsteer.errors import PackError, StatesError
from expertsteer.layer_pair import LayerPair
from expertsteer.tensor_file import load_tensor_file, read_description, save_tensor_file
from helpers import WIDTH, random_vector, tiny_language_model


def test_each_kind_is_known_by_its_content(tmp_path):
    model = tiny_language_model("llama")
    encoder = Affine((torch.eye(WIDTH),), torch.zeros(WIDTH))
    known = model.description
    pack = SteeringPack({1: random_vector()}, {1: 1.0}, known)
    alignment = Alignment(
        {(0, 1): encoder}, (LayerPair(0, 1),), {1: 1.0}, known, known, torch.eye(3)
    )
    states = collect_states(model, ["w1 w2", "w3"], save_to=tmp_path / "states", progress=False)
    for saved, kind, original in (
        (pack.save(tmp_path / "one"), "steering-pack", pack),
        (alignment.save(tmp_path / "two"), "alignment", alignment),
        (tmp_path / "states", "saved-states", states),
    ):
        assert describe_artifact(saved) == (kind, json.loads(json.dumps(original.summary())))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int64", "uint8"])
def test_a_tensor_of_any_type_is_checked_without_torch(tmp_path, dtype):
    tensors = {"b": torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)), "a": torch.ones(())}
    path = save_tensor_file(tmp_path / "odd", "alignment", tensors, {"n": 1})
    assert read_description(path, ["steering-pack", "alignment"]) == ("alignment", {"n": 1})
    read, _ = load_tensor_file(path, "alignment")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackError, match="content was altered"):
        read_description(path, ["alignment"])


def test_a_file_is_described_without_heavy_imports(tmp_path):
    known = tiny_language_model("llama").description
    path = SteeringPack({1: random_vector()}, {1: 1.0}, known).save(tmp_path / "one")
    code = (
        "import sys; from expertsteer.cli.app import app; "
        f"app(['inspect', {str(path)!r}], standalone_mode=False); "
        "print('loaded:', {'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "steers the layers 1" in shown.stdout
    assert "loaded: set()" in shown.stdout


def test_a_file_with_something_behind_its_tensors_is_refused(tmp_path):
    path = save_tensor_file(tmp_path / "long", "alignment", {"a": torch.ones(2)}, {})
    with path.open("ab") as file:
        file.write(b"rest")
    for read in (load_tensor_file, read_description):
        with pytest.raises(PackError, match=r"truncated or not safetensors .*bytes, but expected"):
            read(path, "alignment" if read is load_tensor_file else ["alignment"])


def test_what_is_none_of_them_is_refused(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "plain.safetensors")
    (tmp_path / "notes.txt").write_text("not an artifact")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    odd = json.dumps({"__metadata__": 5}).encode()
    (tmp_path / "odd").write_bytes(len(odd).to_bytes(8, "little") + odd)
    for name, error, message in (
        ("empty", PackError, "truncated or not safetensors"),
        ("odd", PackError, "truncated or not safetensors"),
        ("plain.safetensors", PackError, "format None, but expected a steering pack or an align"),
        ("notes.txt", PackError, "truncated or not safetensors"),
        ("nowhere", PackError, "no such file"),
        ("folder", StatesError, "expected saved states"),
    ):
        with pytest.raises(error, match=message):
            describe_artifact(tmp_path / name)
