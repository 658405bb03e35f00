"""The packs a server holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expertsteer.errors import PackError, ParameterError
from expertsteer.models import describe_model
from expertsteer.pack import SteeringPack
from expertsteer.serving.request import SteeringRequest
from expertsteer.serving.shelf import Shelf
from helpers import random_vector, tiny_language_model, tiny_model


def make(layers=(0, 2), seed=0, family="llama", **fields) -> SteeringPack:
    return SteeringPack(
        {layer: random_vector(seed + layer, length=1.0) for layer in layers},
        {layer: layer + 1.0 for layer in layers},
        describe_model(tiny_model(family), "owner/target"),
        **fields,
    )


@pytest.fixture
def files(tmp_path):
    first = make().save(tmp_path / "happy")
    second = make((1, 2), seed=5).save(tmp_path / "a=b" / "formal.v2")
    return first, second


def test_names_are_given_or_those_of_the_files(files):
    first, second = files
    shelf = Shelf.load([f"cheerful={first}", str(second), first], tiny_language_model("llama"))
    assert shelf.names == ("cheerful", "formal.v2", "happy")
    assert shelf.find("formal.v2").layers == (1, 2)


def test_a_name_twice_is_refused(files):
    first, second = files
    with pytest.raises(ParameterError, match="two packs of the name 'happy'"):
        Shelf.load([str(first), f"happy={second}"])


@pytest.mark.parametrize("argument", ["=pack.safetensors", "happy="])
def test_half_an_argument_is_refused(argument):
    with pytest.raises(ParameterError, match="expected NAME=PATH or PATH"):
        Shelf.load([argument])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PackError, match=r"none.safetensors, but there is no such file"):
        Shelf.load([f"happy={tmp_path / 'none.safetensors'}"])


def test_an_unknown_pack_is_answered_with_the_known_ones(files):
    shelf = Shelf.load([str(files[0]), f"formal={files[1]}"])
    with pytest.raises(ParameterError) as caught:
        shelf.find("sad")
    assert str(caught.value) == (
        "Got the pack 'sad', but expected one that this server holds: happy, formal."
    )
    with pytest.raises(ParameterError, match="holds: none"):
        Shelf({}).find("sad")


def test_a_pack_for_another_model_is_refused_with_the_reason(tmp_path, files):
    other = make(family="qwen2").save(tmp_path / "other")
    with pytest.raises(PackError, match=r"the pack 'other'.*type llama instead of qwen2"):
        Shelf.load([str(files[0]), str(other)], tiny_language_model("llama"))
    # A description of the model serves as well, where the model itself runs elsewhere.
    description = describe_model(tiny_model("llama"))
    Shelf.load([str(files[0])], description)
    tuned = dataclasses.replace(description, weights="0" * 16)
    with pytest.raises(PackError, match="weights 0000000000000000 instead of"):
        Shelf.load([str(files[0])], tuned)
    Shelf.load([str(files[0])], tuned, force=True)


def test_requests_add_up_by_positions_and_layer():
    happy, formal = make(), make((1, 2), seed=5)
    shelf = Shelf({"happy": happy, "formal": formal})
    totals = shelf.vectors(
        [
            SteeringRequest(pack="happy", strength=0.5),
            SteeringRequest(pack="formal", strength=-2.0),
            SteeringRequest(pack="happy", strength=1.0, positions="last"),
        ]
    )
    assert totals.keys() == {"all", "last"}
    assert totals["all"].keys() == {0, 1, 2}
    expected = 0.5 * 3.0 * happy.vectors[2] - 2.0 * 3.0 * formal.vectors[2]
    torch.testing.assert_close(totals["all"][2], expected)
    torch.testing.assert_close(totals["all"][1], -2.0 * 2.0 * formal.vectors[1])
    torch.testing.assert_close(totals["last"][0], happy.vectors[0])
    assert shelf.vectors([]) == {}


def test_the_packs_own_strength_is_the_default():
    shelf = Shelf({"happy": make(strength=0.25), "weak": make(strength=0.0)})
    vectors = shelf.vectors([SteeringRequest(pack="happy")])["all"]
    torch.testing.assert_close(vectors[0], 0.25 * make().vectors[0])
    with pytest.raises(ParameterError, match="pack of strength 0"):
        shelf.vectors([SteeringRequest(pack="weak")])


def test_a_strength_beyond_float32_is_refused():
    shelf = Shelf({"happy": make()})
    with pytest.raises(ParameterError, match="stay finite"):
        shelf.vectors([SteeringRequest(pack="happy", strength=1e300)])
