"""Opening whatever was saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from expertsteer import Alignment, States, SteeringPack, collect_states
from expertsteer.artifacts import open_artifact
from expertsteer.errors import PackError, StatesError
from expertsteer.pack import LayerPair
from helpers import WIDTH, random_vector, tiny_language_model


def test_each_kind_is_known_by_its_content(tmp_path):
    model = tiny_language_model("llama")
    encoder = (torch.eye(WIDTH), torch.zeros(WIDTH))
    known = model.description
    pack = SteeringPack({1: random_vector()}, {1: 1.0}, known)
    alignment = Alignment(
        {(0, 1): encoder}, (LayerPair(0, 1),), {1: 1.0}, known, known, torch.eye(3)
    )
    states = collect_states(model, ["w1 w2", "w3"], save_to=tmp_path / "states", progress=False)
    for saved, kind in (
        (pack.save(tmp_path / "one"), SteeringPack),
        (alignment.save(tmp_path / "two"), Alignment),
        (tmp_path / "states", States),
    ):
        opened = open_artifact(saved)
        assert type(opened) is kind
        original = {SteeringPack: pack, Alignment: alignment, States: states}[kind]
        assert opened.summary() == original.summary()
    assert torch.equal(open_artifact(tmp_path / "two.safetensors").mutual_information, torch.eye(3))


def test_what_is_none_of_them_is_refused(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "plain.safetensors")
    (tmp_path / "notes.txt").write_text("not an artifact")
    (tmp_path / "folder").mkdir()
    for name, error, message in (
        ("plain.safetensors", PackError, "format None, but expected a steering pack"),
        ("notes.txt", PackError, "truncated or not a safetensors file"),
        ("nowhere", PackError, "no such file"),
        ("folder", StatesError, "expected saved states"),
    ):
        with pytest.raises(error, match=message):
            open_artifact(tmp_path / name)
