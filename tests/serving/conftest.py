"""A tiny model and packs on disk, and servers on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from expertsteer.models import LanguageModel, load_model
from expertsteer.pack import SteeringPack
from helpers import random_vector, tiny_model, tiny_tokenizer
from server_process import LONG, Server, start_server

Start = Callable[..., Server]


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """Return a function that starts a server which ends with the tests."""
    servers: list[Server] = []

    def starter(*arguments: object, **options: dict[str, str] | None) -> Server:
        servers.append(start_server(*arguments, **options))
        return servers[-1]

    yield starter
    for server in servers:
        server.end()


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Return a tiny model that reads text of any length, as loaded from its folder."""
    folder = tmp_path_factory.mktemp("target")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONG}))
    settings = json.loads((folder / "generation_config.json").read_text())
    # Nothing ends a text by itself, so that every test knows how long it becomes.
    settings.pop("eos_token_id", None)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return load_model(folder)


@pytest.fixture(scope="session")
def packs(target: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packs")
    saved = {}
    for seed, (name, layers) in enumerate({"happy": (0, 2), "formal": (1, 2)}.items()):
        pack = SteeringPack(
            {layer: random_vector(10 * seed + layer, length=1.0) for layer in layers},
            {layer: 4.0 + layer for layer in layers},
            target.description,
            strength=0.5,
        )
        saved[name] = pack.save(folder / name)
    return saved


@pytest.fixture(scope="session")
def server(start: Start, target: LanguageModel, packs: dict[str, Path]) -> Server:
    arguments = [f"--pack={name}={path}" for name, path in packs.items()]
    return start(target.name, *arguments, "--served-model-name", "tiny")


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()
