"""How long a study takes: tokens to read, times what a token costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from expertsteer.models import load_model
from expertsteer.models.batches import padded
from expertsteer.study.cell import Cell
from expertsteer.study.settings import ModelSettings, StudySettings

__all__ = ["estimate_seconds", "n_tokens"]

# English in today's vocabularies.
_CHARACTERS_A_TOKEN = 4
# Readings of the budget's plain text until the strength is found, and one of the test's.
_READINGS_OF_PLAIN_TEXT = 4
_PROBE = "The committee met on Tuesday to discuss the plans for the new library and its garden. "


def n_tokens(study: StudySettings, cell: Cell) -> int:
    """Return about how many tokens a cell's target reads or writes."""
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
    test = characters["test"] // _CHARACTERS_A_TOKEN
    if cell.benchmark.judge is not None and words is not None:
        test += len(words.prompts) // 2 * cell.benchmark.settings.max_new_tokens
    if cell.benchmark.settings.open:
        n_questions = len(
            {g for g, s in zip(examples.groups, examples.splits, strict=True) if s == "test"}
        )
        test += n_questions * cell.benchmark.settings.max_new_tokens
    if cell.arm.method == "none":
        return test
    shares = cell.arm.strength_shares or study.strength_shares
    validation = len(shares) * characters["validation"] // _CHARACTERS_A_TOKEN
    plain = _READINGS_OF_PLAIN_TEXT * study.n_plain * len(_PROBE) // _CHARACTERS_A_TOKEN
    return test + validation + plain


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
        wanted = sum(n_tokens(study, cell) for cell in left if cell.target == settings)
        known = [
            row["total_seconds"] / row["n_tokens"]
            for row in rows
            if row["target"] == settings.name and row.get("n_tokens")
        ]
        each = sum(known) / len(known) if known else _seconds_a_token(settings)
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
