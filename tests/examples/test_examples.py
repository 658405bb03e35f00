"""Every example runs and shows what it says it shows."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from expertsteer.generation import generate_side_by_side
from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack
from server_process import Server, saved_packs, saved_target, start_server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> LanguageModel:
    return saved_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def pack(target, tmp_path_factory) -> Path:
    # At the strength of the examples, random vectors must be long to be seen.
    path = saved_packs(target, tmp_path_factory.mktemp("packs"))["happy"]
    return SteeringPack.load(path).scale(20).save(path)


@pytest.fixture(scope="module")
def server(target, pack) -> Iterator[Server]:
    running = start_server(target.name, f"--pack={pack}")
    yield running
    running.end()


@pytest.fixture
def shown(capsys, monkeypatch) -> Callable[..., dict[str, str]]:
    """Return a function that runs an example and returns its lines by their names."""

    def run(name: str, *arguments: object) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
        return {head: text for head, _, text in lines}

    return run


def expected(target, pack, prompt: str, positions: str, chat: bool) -> dict[str, str]:
    (found,) = generate_side_by_side(
        *(target, [SteeringPack.load(pack)], [prompt], [0.1]),
        max_new_tokens=20,
        positions=positions,
        chat_template=chat,
        progress=False,
    )
    return {"unsteered": found.continuations[0.0], "steered": found.continuations[0.1]}


def test_transformers_pipeline(shown, target, pack):
    texts = shown("transformers_pipeline.py", target.name, pack, "w1 w2")
    assert texts == expected(target, pack, "w1 w2", "all", chat=False)
    assert texts["steered"] != texts["unsteered"]


def test_openai_client(shown, server, target, pack):
    texts = shown("openai_client.py", server.address, "happy", "w1 w2")
    assert texts == expected(target, pack, "w1 w2", "generated", chat=True)
    assert texts["steered"] != texts["unsteered"]


def test_langchain_client(shown, server, target, pack):
    texts = shown("langchain_client.py", server.address, "happy", "w1 w2")
    prompt = "Write a sentence about w1 w2."
    assert texts == expected(target, pack, prompt, "all", chat=True)
    assert texts["steered"] != texts["unsteered"]


@pytest.mark.integration
@pytest.mark.xdist_group("real models")
def test_notebook(tmp_path):
    committed = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    again = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    for cell in again.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(again, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "happy.safetensors").is_file()
    labels = ["unsteered", "strength +0.1", "strength -0.1"]
    for notebook in (committed, again):
        outputs = notebook.cells[-1].outputs
        printed = "".join(output.text for output in outputs if output.name == "stdout")
        # A text may be of several lines.
        texts = re.split("^(" + "|".join(map(re.escape, labels)) + "): ", printed, flags=re.M)
        assert texts[1::2] == labels
        assert len(set(texts[2::2])) == 3
