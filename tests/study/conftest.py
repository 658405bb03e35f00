"""A study of two tiny saved models on a file of questions and one of labelled texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from helpers import WORDS, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    saved = {}
    for name, family, n_layers in (("target", "llama", 3), ("expert", "qwen2", 4)):
        tiny_model(family, seed=n_layers, n_layers=n_layers).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        saved[name] = str(folder / name)
    return saved


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    questions, texts = [], []
    for n in range(60):
        words = rng.sample(WORDS, 12)
        split = ("train", "validation", "test")[n % 3]
        right, *wrong = rng.sample(WORDS[:20], 1) + rng.sample(WORDS[40:], 2)
        choices = [right, *wrong]
        rng.shuffle(choices)
        row = {"question": " ".join(words), "choices": choices, "answer": choices.index(right)}
        questions.append(row | {"split": split, "id": f"q{n}"})
        texts.append(
            {"text": f"{' '.join(words[:5])} {WORDS[n % 2]}", "label": n % 2, "split": split}
        )
    plain = ". ".join(" ".join(rng.sample(WORDS, 9)).capitalize() for _ in range(80))
    paths = {}
    for name, rows in (("questions", questions), ("texts", texts)):
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths["plain"] = str(folder / "plain.txt")
    Path(paths["plain"]).write_text(plain)
    return paths


@pytest.fixture
def study_file(models, files, tmp_path):
    """Return a function that writes a study's YAML with some fields changed."""

    def write(**changes) -> Path:
        values = {
            "targets": [{"model": models["target"], "name": "small"}],
            "experts": [{"model": models["expert"], "name": "large"}],
            "benchmarks": [
                {"name": "questions", "data": files["questions"], "domain": "general"},
                {"name": "texts", "data": files["texts"], "domain": "behaviour"},
            ],
            "methods": [
                "none",
                "random",
                "mean_difference",
                "prompt",
                {"method": "expertsteer_paper", "aligner_options": {"n_steps": 20}},
                "expertsteer",
                "transferred",
            ],
            "n_train": 16,
            "n_validation": 8,
            "n_test": 12,
            "n_plain": 6,
            "n_beginnings": 40,
            "budget": 1.3,
            "plain_text": files["plain"],
            "instructions": {"general": "w1 w2 w3", "behaviour": "w4 w5"},
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write
