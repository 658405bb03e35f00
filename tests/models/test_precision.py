"""Which floating-point type is fast here, and the warning where a model's is not."""

import warnings

import pytest
import torch

from expertsteer import load_model
from expertsteer.models.precision import fastest_dtype, warn_of_slow_dtype


@pytest.fixture
def processor(monkeypatch):
    """Return a function that gives this machine a processor with some instructions."""

    def has(*names):
        found = {"avx2": True} | dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)

    return has


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16"])
def test_the_fastest_is_bfloat16_where_the_processor_has_it(processor, instructions):
    processor(instructions)
    assert fastest_dtype("cpu") == torch.bfloat16


def test_the_fastest_is_float32_elsewhere(processor, monkeypatch):
    processor("avx512_fp16")
    assert fastest_dtype("cpu") == torch.float32
    assert fastest_dtype("mps") == torch.float32
    # A torch that cannot tell.
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fastest_dtype("cpu") == torch.float32


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_fastest_of_a_gpu_is_what_it_has_without_emulation(monkeypatch, has_it, expected):
    asked = []

    def is_supported(*, including_emulation):
        asked.append(including_emulation)
        return has_it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert fastest_dtype("cuda") == expected
    assert asked == [False]


def test_a_model_loads_in_the_fastest_type(checkpoint, processor):
    processor()
    assert load_model(checkpoint, dtype="fastest").model.dtype == torch.float32
    processor("avx512_bf16")
    assert load_model(checkpoint, dtype="fastest").model.dtype == torch.bfloat16
    # What is asked of a GPU is the GPU's matter: here there is none, or one that has it.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(checkpoint, dtype="fastest", device_map="auto")
    assert loaded.model.dtype == fastest_dtype(device)


class AskedError(Exception):
    """What device's type was asked for; nothing is loaded after that."""


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({}, "cpu"),
        ({"device": "cuda:1"}, "cuda"),
        ({"device": "mps"}, "mps"),
        ({"device_map": "cpu"}, "cpu"),
        ({"device_map": "cuda:0"}, "cuda"),
        ({"device_map": "auto"}, "cuda"),
        ({"device_map": "balanced"}, "cuda"),
        ({"device_map": {"": 0}}, "cuda"),
    ],
)
def test_the_device_decides_even_where_there_is_a_gpu(checkpoint, monkeypatch, option, expected):
    def ask(device_type):
        raise AskedError(device_type)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("expertsteer.models.loading.fastest_dtype", ask)
    with pytest.raises(AskedError, match=f"^{expected}$"):
        load_model(checkpoint, dtype="fastest", **option)


def test_a_slow_type_is_warned_of(checkpoint, processor):
    processor()
    with pytest.warns(UserWarning, match=r"bfloat16.*no instructions.*dtype='fastest'"):
        load_model(checkpoint, dtype="bfloat16")
    with pytest.warns(UserWarning, match="float16"):
        load_model(checkpoint, dtype="float16")


def test_no_warning_without_a_reason(checkpoint, processor, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor()
        load_model(checkpoint)
        processor("avx512_bf16")
        load_model(checkpoint, dtype="bfloat16")
        processor()
        # Weights elsewhere, or a torch that cannot tell.
        warn_of_slow_dtype(torch.nn.Linear(2, 2, device="meta", dtype=torch.bfloat16), "a")
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        warn_of_slow_dtype(torch.nn.Linear(2, 2, dtype=torch.bfloat16), "a")
