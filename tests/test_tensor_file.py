"""The file format of packs and alignments."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from expertsteer.errors import ExpertSteerError, PackError
from expertsteer.tensor_file import load_tensor_file, save_tensor_file, tensor_file_path

TENSORS = {
    "plain": torch.randn(3, 4),
    "transposed": torch.randn(4, 3).T,
    "slice": torch.randn(8)[::2],
    "half": torch.randn(5).bfloat16(),
    "whole": torch.arange(3),
    "single": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
}
DESCRIPTION = {"number": 0.1 + 0.2, "text": "ñ 字", "list": [1, None, {"deep": True}]}


def test_tensors_and_description_survive(tmp_path):
    path = save_tensor_file(tmp_path / "a.b", "thing", TENSORS, DESCRIPTION)
    assert path.name == "a.b.safetensors"
    tensors, description = load_tensor_file(path, "thing")
    assert description == DESCRIPTION
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_any_reader_of_safetensors_can_read_it(tmp_path):
    path = save_tensor_file(tmp_path / "thing", "thing", TENSORS, DESCRIPTION)
    assert load_file(path).keys() == TENSORS.keys()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "expertsteer-thing"
    assert json.loads(metadata["description"]) == DESCRIPTION


@pytest.mark.parametrize(
    ("given", "saved"),
    [("a", "a.safetensors"), ("a.safetensors", "a.safetensors"), ("a.pt", "a.pt.safetensors")],
)
def test_the_suffix_is_appended_where_missing(given, saved):
    assert tensor_file_path(given).name == saved


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_tensor_file(tmp_path / "thing", "thing", TENSORS, DESCRIPTION)
    old = path.read_bytes()

    def full(_tensors, scratch, _metadata):
        scratch.write_bytes(old[:100])
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ExpertSteerError, match=r"Cannot write .*No space left on device"):
        save_tensor_file(path, "thing", {}, {})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", "2", "version '2', but this release reads version 1. Upgrade"),
        ("version", None, "version None"),
        ("format", "expertsteer-other", "format 'expertsteer-other', but expected a thing"),
        ("sha256", "0" * 64, "content was altered"),
        ("sha256", None, "content was altered"),
        ("description", None, "content was altered"),
        ("description", '{"number": 1}', "content was altered"),
    ],
)
def test_metadata_that_does_not_belong_is_refused(tmp_path, key, value, message):
    path = save_tensor_file(tmp_path / "thing", "thing", TENSORS, DESCRIPTION)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {key: value}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})
    with pytest.raises(PackError, match=message):
        load_tensor_file(path, "thing")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"plain": tensors["plain"].reshape(4, 3)},
        lambda tensors: tensors | {"plain": tensors["plain"].view(torch.int32)},
        lambda tensors: tensors | {"more": torch.ones(1)},
        lambda tensors: {name: t for name, t in tensors.items() if name != "half"},
        lambda tensors: {name.replace("half", "halb"): t for name, t in tensors.items()},
    ],
    ids=["shape", "dtype", "added", "removed", "renamed"],
)
def test_tensors_that_were_exchanged_are_noticed(tmp_path, change):
    path = save_tensor_file(tmp_path / "thing", "thing", TENSORS, DESCRIPTION)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata)
    with pytest.raises(PackError, match="content was altered"):
        load_tensor_file(path, "thing")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(PackError, match=r"no such file\. Expected a steering pack"):
        load_tensor_file(tmp_path, "steering-pack")
