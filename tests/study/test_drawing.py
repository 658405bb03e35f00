"""Questions are drawn once for all methods, nested, and never from the test split."""

from __future__ import annotations

import numpy as np
import pytest

from expertsteer.data import load_examples
from expertsteer.errors import DataError
from expertsteer.study.drawing import draw_examples, first_questions, with_label_noise


def groups(examples, split):
    return list(dict.fromkeys(examples.split(split).groups))


def test_a_larger_draw_begins_with_the_smaller(files):
    examples = load_examples(files["questions"])
    small, large = (draw_examples(examples, n, 4, 6, seed=1) for n in (8, 16))
    assert groups(large, "train")[:8] == groups(small, "train")
    assert groups(large, "test") == groups(small, "test")
    other = draw_examples(examples, 8, 4, 6, seed=2)
    assert groups(other, "train") != groups(small, "train")


def test_validation_questions_fill_a_small_train_split_and_test_ones_never(files):
    examples = load_examples(files["questions"])
    drawn = draw_examples(examples, 30, 4, None, seed=0)
    original = dict(zip(examples.groups, examples.splits, strict=True))
    assert {original[g] for g in groups(drawn, "train")} == {"train", "validation"}
    assert {original[g] for g in groups(drawn, "test")} == {"test"}
    assert not set(groups(drawn, "train")) & set(groups(drawn, "validation"))
    assert len(groups(drawn, "test")) == 20


def test_fewer_train_questions_are_the_first_ones(files):
    drawn = draw_examples(load_examples(files["questions"]), 16, 4, 6, seed=0).for_fitting()
    kept = drawn.subset(first_questions(drawn, 5))
    assert groups(kept, "train") == groups(drawn, "train")[:5]
    assert groups(kept, "validation") == groups(drawn, "validation")


def test_noise_moves_the_right_answer_or_the_class_of_a_share(files):
    drawn = draw_examples(load_examples(files["questions"]), 16, 4, 6, seed=0)
    noisy = with_label_noise(drawn, 0.25, seed=0)
    changed = {
        g for g, a, b in zip(drawn.groups, drawn.labels, noisy.labels, strict=True) if a != b
    }
    assert len(changed) == 4
    assert changed <= set(groups(drawn, "train"))
    right = {g: 0 for g in drawn.groups}
    for group, label in zip(noisy.groups, noisy.labels, strict=True):
        right[group] += label > 0
    assert set(right.values()) == {1}
    texts = draw_examples(load_examples(files["texts"]), 16, 4, 6, seed=0)
    flipped = with_label_noise(texts, 0.5, seed=0)
    assert np.sum(flipped.labels != texts.labels) == 8


def test_a_missing_split_is_refused(files):
    examples = load_examples(files["questions"])
    with pytest.raises(DataError, match="no rows in the split 'validation'"):
        draw_examples(
            examples.subset(n for n, s in enumerate(examples.splits) if s != "validation"),
            8,
            4,
            6,
            seed=0,
        )
