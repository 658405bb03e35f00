"""What `vllm serve` is started with."""

from __future__ import annotations

import json
import os
import sys

import pytest

from expertsteer.errors import PackError, ParameterError
from expertsteer.models import LanguageModel, ModelSource
from expertsteer.pack import SteeringPack
from expertsteer.serving.options import ServeOptions
from expertsteer.serving.vllm_front import serve_with_vllm
from helpers import random_vector, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pack(tmp_path):
    target = LanguageModel(tiny_model("llama"), None, "tiny").description  # pyright: ignore
    return SteeringPack({1: random_vector()}, {1: 2.0}, target).save(tmp_path / "happy")


@pytest.fixture
def started(monkeypatch):
    """Return what would have taken the process's place."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    return calls


def test_the_command_names_model_packs_and_address(folder, pack, started, monkeypatch):
    monkeypatch.chdir(pack.parent)
    options = ServeOptions(
        ModelSource(str(folder), dtype="float32", revision="v1", trust_remote_code=True),
        ("happy.safetensors", f"glad={pack}"),
        host="127.0.0.1",
        port=8123,
        api_key="secret",
        served_model_name="mine",
        engine_arguments=("--enforce-eager",),
    )
    serve_with_vllm(options)
    ((program, command, environment),) = started
    assert program == sys.executable
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    assert command[5] == "--enforce-eager"
    given = dict(zip(command[6:-1:2], command[7:-1:2], strict=True))
    settings = {"packs": {"happy": str(pack), "glad": str(pack)}, "force": False}
    assert json.loads(given.pop("--additional-config")) == {"expertsteer": settings}
    assert given == {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--served-model-name": "mine",
        "--dtype": "float32",
        "--revision": "v1",
    }
    assert command[-1] == "--trust-remote-code"
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in command


def test_a_pack_for_another_model_is_refused(folder, pack, started, tmp_path):
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    with pytest.raises(PackError, match=r"Cannot serve the pack 'happy'.*weights"):
        serve_with_vllm(ServeOptions(ModelSource(str(other)), (str(pack),)))
    assert not started
    serve_with_vllm(ServeOptions(ModelSource(str(other)), (str(pack),), force=True))
    assert '"force": true' in " ".join(started[0][1])


def test_a_setting_that_vllm_makes_is_refused(folder, pack, started):
    with pytest.raises(ParameterError, match="device='cuda:0' with vLLM"):
        serve_with_vllm(ServeOptions(ModelSource(str(folder), device="cuda:0"), (str(pack),)))
    assert not started


@pytest.mark.parametrize(
    "argument",
    ["--host", "--host=0.0.0.0", "--port", "--api_key=x", "--served-model-name", "--uds=/s"],
)
def test_what_decides_who_can_connect_is_not_overruled(folder, pack, started, argument):
    options = ServeOptions(ModelSource(str(folder)), (str(pack),), engine_arguments=(argument,))
    with pytest.raises(ParameterError, match=f"Got {argument} behind --, but expected it before"):
        serve_with_vllm(options)
    settings = ("--additional-config", "{}")
    options = ServeOptions(ModelSource(str(folder)), (str(pack),), engine_arguments=settings)
    with pytest.raises(ParameterError, match="the packs go to vLLM in it"):
        serve_with_vllm(options)
    assert not started
