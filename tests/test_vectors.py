"""Vectors that others made."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from expertsteer.errors import PackError
from expertsteer.models import describe_model
from expertsteer.pack import SteeringPack
from expertsteer.vectors import load_vector
from helpers import random_vector, tiny_model

VALUES = np.array([1.5, -2.0, 0.25, 3.0])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", ">f4"])
@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_numpy_arrays(tmp_path, dtype, shape):
    values = np.round(VALUES).astype(dtype).reshape(shape)
    np.save(tmp_path / "vector.npy", values)
    vector = load_vector(tmp_path / "vector.npy")
    assert vector.dtype == torch.float32
    assert vector.tolist() == np.round(VALUES).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_single_tensor(tmp_path, dtype):
    save_file({"anything": torch.tensor(VALUES, dtype=dtype)[None]}, tmp_path / "v.safetensors")
    vector = load_vector(tmp_path / "v.safetensors")
    assert vector.dtype == torch.float32
    assert vector.tolist() == VALUES.tolist()


def test_a_pack(tmp_path):
    pack = SteeringPack({1: random_vector()}, {1: 1.0}, describe_model(tiny_model("llama")))
    loaded = load_vector(pack.save(tmp_path / "pack"))
    assert isinstance(loaded, SteeringPack)
    assert torch.equal(loaded.vectors[1], pack.vectors[1])


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_pickles_are_never_loaded(tmp_path):
    for name in ("v.npy", "v.safetensors", "v.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "object.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    for name in ("v.npy", "v.safetensors", "v.pt", "object.npy"):
        with pytest.raises(PackError, match=f"Got .*{name}"):
            load_vector(tmp_path / name)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "many.npz", one=VALUES)
    (tmp_path / "many.npz").rename(tmp_path / "archive.npy")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "complex.npy", VALUES * 1j)
    np.save(tmp_path / "cut.npy", VALUES)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-3])
    (tmp_path / "empty.npy").touch()
    (tmp_path / "empty.safetensors").touch()
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "two.safetensors")
    for name, message in {
        "archive.npy": "not a plain numpy array",
        "words.npy": "dtype <U1, but expected real numbers",
        "complex.npy": "dtype complex128, but expected real numbers",
        "cut.npy": "not a plain numpy array",
        "empty.npy": "not a plain numpy array",
        "empty.safetensors": "truncated or not safetensors",
        "two.safetensors": "2 tensors, but expected a pack or one vector",
        "nowhere.npy": "no such file",
    }.items():
        with pytest.raises(PackError, match=message):
            load_vector(tmp_path / name)
