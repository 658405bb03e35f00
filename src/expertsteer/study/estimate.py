"""How long a study takes: tokens to read, times what one costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from expertsteer.fine_tuning import DEFAULT_EPOCHS
from expertsteer.models import load_model
from expertsteer.models.batches import padded
from expertsteer.study.cell import Cell
from expertsteer.study.settings import ModelSettings, StudySettings

__all__ = ["estimate_seconds", "n_tokens"]

# English in today's vocabularies.
_CHARACTERS_A_TOKEN = 4
# Readings of the budget's plain text until the strength is found, and one of the test's.
_READINGS_OF_PLAIN_TEXT = 6
# What a token that is written costs in tokens that are read, and one that is trained on.
_WRITTEN, _TRAINED = 10, 3
_PROBE = "The committee met on Tuesday to discuss the plans for the new library and its garden. "


def n_tokens(study: StudySettings, cell: Cell) -> int:
    """Return about how much a cell's target has to do, in tokens to read."""
    characters = _characters(cell)
    settings, words = cell.benchmark.settings, cell.benchmark.words
    test = characters["test"] // _CHARACTERS_A_TOKEN
    n_written = 0
    if cell.benchmark.judge is not None and words is not None:
        n_written = len(words.prompts) // 2
    elif settings.open:
        groups, splits = cell.benchmark.examples.groups, cell.benchmark.examples.splits
        n_written = len({g for g, s in zip(groups, splits, strict=True) if s == "test"})
    test += _WRITTEN * n_written * settings.max_new_tokens
    if cell.arm.method == "none":
        return test
    if cell.arm.method == "prompt":
        return test + characters["validation"] // _CHARACTERS_A_TOKEN
    if cell.arm.method == "lora":
        trained = _TRAINED * DEFAULT_EPOCHS * characters["train"]
        return test + (trained + characters["validation"]) // _CHARACTERS_A_TOKEN
    shares = cell.arm.strength_shares or study.strength_shares
    return test + _n_tokens_of_search(study, len(shares) * characters["validation"])


def _n_tokens_of_search(study: StudySettings, validation: int) -> int:
    """Return the tokens of finding a vector's strength, with so many validation characters."""
    plain = _READINGS_OF_PLAIN_TEXT * study.n_plain * len(_PROBE)
    return (validation + plain) // _CHARACTERS_A_TOKEN


def _characters(cell: Cell) -> dict[str, int]:
    """Return the characters to read by split."""
    examples = cell.benchmark.examples
    characters: dict[str, int] = dict.fromkeys(("train", "validation", "test"), 0)
    seen: set[str] = set()
    for group, prompt, answer, split in zip(
        examples.groups, examples.prompts, examples.answers, examples.splits, strict=True
    ):
        # A prompt is read once for all its answers.
        characters[split] += len(answer) + len(prompt) * (group not in seen)
        seen.add(group)
    words = cell.benchmark.words
    if words is not None:
        characters["validation"] = characters["test"] = sum(map(len, words.prompts)) // 2
    return characters


def _n_tokens_of_choices(study: StudySettings, cells: Sequence[Cell]) -> int:
    """Return the tokens that are read until the target layers of some cells are chosen."""
    choices = {
        (cell.benchmark, cell.arm.n_train, cell.arm.label_noise): cell
        for cell in cells
        if cell.arm.is_vector
    }
    n_layers = len(study.layer_depths)
    return n_layers * sum(
        _n_tokens_of_search(study, _characters(cell)["validation"]) for cell in choices.values()
    )


def estimate_seconds(
    study: StudySettings, left: Sequence[Cell], rows: Sequence[dict[str, Any]]
) -> float:
    """Estimate how long some cells take.

    What a token costs is known from the target's finished cells; where there are none, the
    model reads a few sentences.

    Parameters
    ----------
    study : StudySettings
    left : sequence of Cell
    rows : sequence of dict
        Finished cells.

    Returns
    -------
    float
        Seconds, without the collecting of an expert's states.
    """
    total = 0.0
    for settings in {cell.target.name: cell.target for cell in left}.values():
        own = [cell for cell in left if cell.target == settings]
        wanted = sum(n_tokens(study, cell) for cell in own) + _n_tokens_of_choices(study, own)
        known = [
            row["total_seconds"] / row["n_tokens"]
            for row in rows
            if row["target"] == settings.name and row.get("n_tokens") and "error" not in row
        ]
        # A cell during which the machine slept is not to count.
        each = median(known) if known else _seconds_a_token(settings)
        total += wanted * each
    return total


def _seconds_a_token(settings: ModelSettings) -> float:
    model = load_model(settings.source)
    ids, _ = padded(model, [model.tokenizer(_PROBE * 2)["input_ids"]] * 8, "right")
    with torch.inference_mode():
        started = 0.0
        for _ in range(2):  # the first pass is slower than all that follow
            started = time.perf_counter()
            model.model(input_ids=ids, use_cache=False)
    return (time.perf_counter() - started) / ids.numel()
