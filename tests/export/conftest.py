"""Tiny models on disk, with packs for them."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from expertsteer import SteeringPack, load_model
from expertsteer.models import LanguageModel
from helpers import pack_for, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that saves a tiny model, once a family, and loads it by its folder."""
    root = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save(family: str) -> LanguageModel:
        folder = root / family
        tiny_model(family).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        model = load_model(str(folder))
        # Some architectures have transformers read any tokenizer as one of their own kind.
        return dataclasses.replace(model, tokenizer=tiny_tokenizer())

    return save


@pytest.fixture
def llama(saved) -> LanguageModel:
    return saved("llama")


@pytest.fixture
def pack(llama) -> SteeringPack:
    return pack_for(llama, (1, 2))
