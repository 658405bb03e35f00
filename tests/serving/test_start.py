"""What keeps a server from starting, said in one line."""

from __future__ import annotations

import dataclasses
import socket
import sys

import pytest

from expertsteer.cli.app import main
from expertsteer.errors import ParameterError
from expertsteer.models import ModelSource
from expertsteer.pack import SteeringPack
from expertsteer.serving import engines
from expertsteer.serving.engines import choose_engine
from expertsteer.serving.options import ServeOptions, is_loopback


@pytest.fixture
def refused(capsys, monkeypatch, packs, target):
    """Return a function that runs a command line and returns its exit code and its error."""
    monkeypatch.delenv("EXPERTSTEER_API_KEY", raising=False)

    def run(*arguments, pack=packs["happy"]):
        words = ["serve", target.name, f"--pack={pack}", "--engine", "transformers", *arguments]
        monkeypatch.setattr(sys, "argv", ["expertsteer", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return stop.value.code, error

    return run


def test_a_port_in_use(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = refused("--port", port)
    assert code == 1
    assert f"Cannot listen on 127.0.0.1:{port}: address already in use. Name another" in error


def test_an_address_of_another_machine(refused):
    code, error = refused("--host", "192.0.2.1", "--api-key", "secret", "--port", 0)
    assert code == 1
    assert "Cannot listen on 192.0.2.1:0: cannot assign requested address" in error


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_others_can_connect_only_with_a_key(refused, host):
    code, error = refused("--host", host)
    assert code == 1
    assert f"Got host='{host}' without an API key" in error
    assert "EXPERTSTEER_API_KEY" in error


def test_an_empty_key_is_no_key(refused):
    code, error = refused("--api-key", " ")
    assert code == 1
    assert "Got an empty API key" in error


def test_a_pack_for_another_model(refused, tmp_path, packs):
    pack = SteeringPack.load(packs["happy"])
    other = dataclasses.replace(pack.target, weights="0" * 16)
    path = dataclasses.replace(pack, target=other).save(tmp_path / "other")
    code, error = refused("--port", 0, pack=f"theirs={path}")
    assert code == 1
    assert "Cannot serve the pack 'theirs'" in error
    assert "instead of 0000000000000000" in error


def test_a_pack_that_is_not_there(refused, tmp_path):
    code, error = refused(pack=tmp_path / "none.safetensors")
    assert code == 1
    assert "no such file" in error


def test_arguments_for_vllm_go_to_vllm_alone(refused):
    code, error = refused("--port", 0, "--", "--max-num-seqs", 4)
    assert code == 1
    assert "Got --max-num-seqs 4 behind the options, which are for vLLM alone" in error


def test_auto_is_vllm_where_it_is_installed(monkeypatch):
    installed = {"vllm", "starlette", "uvicorn", "jinja2"}
    monkeypatch.setattr(engines, "_is_installed", lambda package: package in installed)
    assert choose_engine("auto") == "vllm"
    installed.remove("vllm")
    assert choose_engine("auto") == "transformers"
    with pytest.raises(ParameterError, match=r'pip install "expertsteer\[vllm\]"'):
        choose_engine("vllm")
    installed.remove("uvicorn")
    with pytest.raises(ParameterError, match=r'uvicorn.*pip install "expertsteer\[serve\]"'):
        choose_engine("auto")
    with pytest.raises(ParameterError, match="expected one of auto, vllm, transformers"):
        choose_engine("llama.cpp")


def test_limits_of_the_embedded_server_are_not_vllms(refused, monkeypatch):
    monkeypatch.setattr(engines, "_is_installed", lambda package: True)
    code, error = refused("--engine", "vllm", "--max-queue", 3)
    assert code == 1
    assert "Got --max-queue with vLLM" in error


def test_loopback_addresses():
    assert is_loopback("127.0.0.1")
    assert is_loopback("127.8.8.8")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("")
    with pytest.raises(ParameterError, match="expected an address of this machine"):
        is_loopback("no such name")


def test_any_options_of_a_server_are_checked():
    with pytest.raises(ParameterError, match="without an API key"):
        ServeOptions(ModelSource("x"), (), host="0.0.0.0")
    assert ServeOptions(ModelSource("x"), (), host="0.0.0.0", api_key="k").model_name == "x"
