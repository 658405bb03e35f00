"""Draw a study's questions: seeded, nested, and never a test question for a vector."""

from __future__ import annotations

import dataclasses
import random
import warnings

import numpy as np

from expertsteer.data import LabelledExamples
from expertsteer.errors import DataError
from expertsteer.evaluation.multiple_choice import is_questions

__all__ = ["draw_examples", "first_questions", "with_label_noise"]


def draw_examples(
    examples: LabelledExamples, n_train: int, n_validation: int, n_test: int | None, seed: int
) -> LabelledExamples:
    """Draw questions (groups of rows) from every split.

    Parameters
    ----------
    examples : LabelledExamples
    n_train, n_validation : int
        Validation questions are drawn first; where the train split is too small, others of
        the validation split fill it up.
    n_test : int or None
        None: all of them.
    seed : int
        A larger draw of the same seed begins with the smaller one.

    Returns
    -------
    LabelledExamples
        Questions in the order drawn, train first.

    Raises
    ------
    DataError
        If a split is empty. One that is smaller than asked for is taken whole, with a warning.
    """
    rows_of: dict[str, list[int]] = {}
    groups: dict[str, dict[str, None]] = {}
    for row, (group, split) in enumerate(zip(examples.groups, examples.splits, strict=True)):
        rows_of.setdefault(group, []).append(row)
        groups.setdefault(split, {})[group] = None
    drawn = {split: list(names) for split, names in groups.items()}
    for split in sorted(drawn):
        random.Random(f"{seed} {split}").shuffle(drawn[split])
    for split in ("validation", "test"):
        if not drawn.get(split):
            raise DataError(
                f"Got no rows in the split {split!r} of {examples.source}, but a study needs some. "
                "Add rows, or leave the split column out to have the file split 60/20/20."
            )
    spare = drawn["validation"][n_validation:]
    chosen = {
        "train": (drawn.get("train", []) + spare)[:n_train],
        "validation": drawn["validation"][:n_validation],
        "test": drawn["test"][:n_test],
    }
    for split, n in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        if n is not None and len(chosen[split]) < n:
            warnings.warn(
                f"Got {len(chosen[split])} questions or texts in the split {split!r} of "
                f"{examples.source}, but the study asks for {n}; it takes those.",
                stacklevel=2,
            )
    order = [row for names in chosen.values() for name in names for row in rows_of[name]]
    splits = tuple(
        split for split, names in chosen.items() for name in names for _ in rows_of[name]
    )
    taken = dataclasses.replace(
        examples.subset(order), splits=splits, n_left_out=examples.n_left_out
    )
    taken.require_both_classes("train", min_rows=2)
    return taken


def first_questions(examples: LabelledExamples, n_train: int) -> list[int]:
    """Return the rows that are left where only the first train questions are kept."""
    train = dict.fromkeys(
        group
        for group, split in zip(examples.groups, examples.splits, strict=True)
        if split == "train"
    )
    kept = set(list(train)[:n_train])
    return [
        row
        for row, (group, split) in enumerate(zip(examples.groups, examples.splits, strict=True))
        if split != "train" or group in kept
    ]


def with_label_noise(examples: LabelledExamples, share: float, seed: int) -> LabelledExamples:
    """Give a share of the train questions a wrong label.

    A wrong answer takes the right one's place; a text changes its class.

    Parameters
    ----------
    examples : LabelledExamples
    share : float
        Between 0 and 0.5.
    seed : int

    Returns
    -------
    LabelledExamples
    """
    labels = examples.labels.copy()
    rows_of: dict[str, list[int]] = {}
    for row, (group, split) in enumerate(zip(examples.groups, examples.splits, strict=True)):
        if split == "train":
            rows_of.setdefault(group, []).append(row)
    questions = is_questions(examples)
    rng = random.Random(seed)
    names = list(rows_of)
    for name in rng.sample(names, round(share * len(names))):
        rows = rows_of[name]
        if not questions:
            labels[rows] *= -1
            continue
        wrong = rng.choice([row for row in rows if labels[row] < 0])
        labels[rows] = np.where(np.array(rows) == wrong, 1, -1)
    return dataclasses.replace(examples, labels=labels)
