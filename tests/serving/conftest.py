"""A tiny model and packs on disk, and servers on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from expertsteer.models import LanguageModel
from server_process import Server, saved_packs, saved_target, start_server

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
    return saved_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def packs(target: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_packs(target, tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="session")
def server(start: Start, target: LanguageModel, packs: dict[str, Path]) -> Server:
    arguments = [f"--pack={name}={path}" for name, path in packs.items()]
    return start(target.name, *arguments, "--served-model-name", "tiny")


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()
