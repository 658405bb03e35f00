"""Vectors of other programs become packs that add what those programs add."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from expertsteer import SteeringPack
from expertsteer.errors import PackError
from expertsteer.export import export_pack, import_pack
from expertsteer.states import collect_states
from helpers import WIDTH, contents, pack_for, random_vector

TEXTS = ["w1 w2 w3", "w9 w8", "w4 w40 w41", "w17"]


def write_repeng(path, directions, model_type="llama", architecture="controlvector"):
    """Write a file as repeng's export_gguf does: a key is the 0-based block it steers."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", model_type)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, values in directions.items():
        name = layer if isinstance(layer, str) else f"direction.{layer}"
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_svec(path, directions, **fields):
    content = {"model_type": "llama", "directions": directions, "explained_variances": {}}
    path.write_text(json.dumps(content | fields))
    return path


def array(seed, length=1.0):
    return random_vector(seed, length).numpy()


def assert_adds(pack: SteeringPack, expected):
    added = pack.scaled_vectors()
    assert set(added) == set(expected)
    for layer, vector in expected.items():
        torch.testing.assert_close(added[layer], torch.as_tensor(vector), rtol=1e-5, atol=1e-6)


def test_a_control_vector_of_repeng(llama, tmp_path):
    path = write_repeng(tmp_path / "v.gguf", {1: array(1), 2: array(2, 3.0)})
    pack = import_pack(path, llama, TEXTS, progress=False)
    assert_adds(pack, {1: array(1), 2: array(2, 3.0)})
    # The norms are the target's own, so strengths mean what they mean in every pack.
    states = collect_states(llama, TEXTS, progress=False)
    for layer in (1, 2):
        assert pack.mean_residual_norms[layer] == pytest.approx(states.mean_residual_norm(layer))
    assert pack.provenance["imported"]["file"] == "v.gguf"
    assert pack.target == llama.description


def test_one_vector_becomes_a_unit_vector(llama, tmp_path):
    path = write_repeng(tmp_path / "v.gguf", {2: array(2, 3.0)})
    pack = import_pack(path, llama, TEXTS, progress=False)
    assert float(pack.vectors[2].norm()) == pytest.approx(1, abs=1e-6)
    assert pack.strength == pytest.approx(3.0 / pack.mean_residual_norms[2])


def test_there_and_back(llama, pack, tmp_path):
    path = export_pack(pack, tmp_path / "v", "gguf", strength=-0.3).path
    back = import_pack(path, llama, TEXTS, progress=False)
    assert_adds(back, pack.scaled_vectors(-0.3))
    saved = SteeringPack.load(back.save(tmp_path / "back"), llama)
    assert_adds(saved, pack.scaled_vectors(-0.3))
    both = pack.scaled_vectors(pack.strength)
    total = (back + pack).scaled_vectors()
    for layer, vector in total.items():
        torch.testing.assert_close(vector, pack.scaled_vectors(-0.3)[layer] + both[layer])


@pytest.mark.parametrize("by_token", [False, True])
def test_a_svec(llama, tmp_path, by_token):
    values = array(1, 2.0).tolist()
    path = write_svec(tmp_path / "v.svec", {"0": [values] if by_token else values})
    assert_adds(import_pack(path, llama, TEXTS, progress=False), {0: array(1, 2.0)})


def test_layers_of_zeros_are_left_out(llama, tmp_path):
    zeros = np.zeros(WIDTH, np.float32)
    path = write_repeng(tmp_path / "v.gguf", {1: zeros, 2: array(2)})
    assert import_pack(path, llama, TEXTS, progress=False).layers == (2,)
    path = write_repeng(tmp_path / "v.gguf", {1: zeros})
    with pytest.raises(PackError, match="zeros only"):
        import_pack(path, llama, TEXTS, progress=False)


def test_a_file_for_another_architecture_is_told(saved, llama, tmp_path):
    path = write_repeng(tmp_path / "v.gguf", {1: array(1)}, "mistral")
    with pytest.warns(UserWarning, match="'mistral'.*'llama'"):
        import_pack(path, llama, TEXTS, progress=False)


@pytest.mark.parametrize(
    ("directions", "says"),
    [
        ({0: array(1)}, "'direction.0'.*N from 1 up"),
        ({3: array(1)}, "layer 3.*layers 0 to 2"),
        ({1: array(1)[:16]}, "width 16.*width 32"),
        ({1: array(1).astype(np.float16)}, "type F16.*F32"),
        ({1: array(1).reshape(4, 8)}, r"shape \(4, 8\).*one dimension"),
        ({1: array(1), "output.weight": array(2)}, "'output.weight'.*only direction.N"),
        ({1: array(1), "direction.x": array(2)}, "'direction.x'.*only direction.N"),
        ({1: array(1) * np.nan}, "NaN or infinity for layer 1"),
        ({}, "0 tensors"),
    ],
)
def test_control_vectors_that_cannot_be_used(llama, tmp_path, directions, says):
    path = write_repeng(tmp_path / "v.gguf", directions)
    with pytest.raises(PackError, match=f"v.gguf.*{says}"):
        import_pack(path, llama, TEXTS, progress=False)


def test_a_model_in_place_of_a_control_vector(llama, tmp_path):
    path = write_repeng(tmp_path / "v.gguf", {1: array(1)}, architecture="llama")
    with pytest.raises(PackError, match="architecture 'llama'"):
        import_pack(path, llama, TEXTS, progress=False)


def test_a_truncated_control_vector(llama, tmp_path):
    whole = write_repeng(tmp_path / "v.gguf", {1: array(1), 2: array(2)}).read_bytes()
    for size in (0, 3, 30, 100, len(whole) // 2, len(whole) - 64):
        (tmp_path / "v.gguf").write_bytes(whole[:size])
        with pytest.raises(PackError, match="whole GGUF file"):
            import_pack(tmp_path / "v.gguf", llama, TEXTS, progress=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "expected JSON"),
        ("[1]", "directions by layer"),
        ('{"directions": {}}', "directions by layer"),
        ('{"directions": {"-1": [1.0]}}', "layer '-1'"),
        ('{"directions": {"1": "so"}}', "no list of numbers for layer 1"),
        ('{"directions": {"1": [[1.0], [2.0]]}}', r"shape \(2, 1\)"),
        ('{"directions": {"1": [1.0, 2.0]}}', "width 2.*width 32"),
        ('{"directions": {"1": [1.0]}, "num_heads": 4}', "attention heads"),
    ],
)
def test_svecs_that_cannot_be_used(llama, tmp_path, content, says):
    (tmp_path / "v.svec").write_text(content)
    with pytest.raises(PackError, match=f"v.svec.*{says}"):
        import_pack(tmp_path / "v.svec", llama, TEXTS, progress=False)


def test_files_of_other_kinds(llama, tmp_path):
    pack_for(llama).save(tmp_path / "pack")
    with pytest.raises(PackError, match=r"pack.safetensors.*\.gguf or \.svec"):
        import_pack(tmp_path / "pack.safetensors", llama, TEXTS)
    with pytest.raises(PackError, match="no such file"):
        import_pack(tmp_path / "none.gguf", llama, TEXTS)
    assert set(contents(tmp_path)) == {"pack.safetensors"}
