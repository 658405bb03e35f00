from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from expertsteer.data import LabelledExamples, RenderedText, render
from expertsteer.errors import DataError

CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    raw = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    made.chat_template = template
    return made


def make(labels, splits=None, groups=None, prompts=None, answers=None) -> LabelledExamples:
    n = len(labels)
    return LabelledExamples(
        prompts=tuple(prompts or [""] * n),
        answers=tuple(answers or [f"text {row}" for row in range(n)]),
        labels=labels,
        splits=tuple(splits or ["train"] * n),
        groups=tuple(groups or [str(row) for row in range(n)]),
    )


def one(prompt: str, answer: str) -> LabelledExamples:
    return make([1], prompts=[prompt], answers=[answer])


def test_labels_become_int8_whatever_they_came_as():
    for labels in ([1, -1], np.array([1.0, -1.0]), np.array([1, -1], dtype=np.int64)):
        assert make(labels).labels.dtype == np.int8


@pytest.mark.parametrize("labels", [[1, 0], [1, 2], [1, float("nan")], [[1], [-1]]])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(DataError, match="labels other than"):
        make(labels)


def test_no_examples_are_refused():
    with pytest.raises(DataError, match="no examples from memory"):
        make([])


@pytest.mark.parametrize("field", ["prompts", "labels", "splits", "groups"])
def test_lengths_that_differ_are_refused(field):
    fields = {
        "prompts": ("", ""),
        "answers": ("a", "b"),
        "labels": np.array([1, -1]),
        "splits": ("train", "train"),
        "groups": ("0", "1"),
    }
    fields[field] = fields[field][:1]
    with pytest.raises(DataError, match=f"Got 1 {field} for 2 answers"):
        LabelledExamples(**fields)


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match=r"split 'dev' .* train, validation, test"):
        make([1, -1], splits=["train", "dev"])


def test_a_group_in_two_splits_is_refused():
    with pytest.raises(DataError, match=r"group 'q' .* train and test"):
        make([1, -1], splits=["train", "test"], groups=["q", "q"])


def test_split_keeps_order_and_every_field():
    examples = make([1, -1, 1], splits=["test", "train", "test"], prompts=["p0", "p1", "p2"])
    test = examples.split("test")
    assert len(test) == 2
    assert test.prompts == ("p0", "p2")
    assert test.answers == ("text 0", "text 2")
    assert test.labels.tolist() == [1, 1]
    assert test.groups == ("0", "2")


def test_an_empty_split_names_those_that_exist():
    examples = make([1, -1, 1], splits=["train", "train", "test"])
    with pytest.raises(DataError, match="'validation' of memory, which holds 2 train, 1 test"):
        examples.split("validation")


def test_for_fitting_never_holds_test_rows():
    examples = make([1, -1, 1], splits=["train", "validation", "test"])
    assert examples.for_fitting().splits == ("train", "validation")


def test_fingerprint_depends_on_texts_labels_and_order_only():
    examples = make([1, -1])
    assert examples.fingerprint == make([1.0, -1.0], splits=["test"] * 2).fingerprint
    others = [
        make([-1, 1]),
        examples.subset([1, 0]),
        make([1, -1], prompts=["p", ""]),
        make([1, -1], answers=["text 0", "else"]),
    ]
    assert len({examples.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_fingerprint_tells_where_the_prompt_ends():
    assert one("ab", "c").fingerprint != one("a", "bc").fingerprint


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1] * 9, "9 positive and 0 negative"),
        ([-1] * 9, "0 positive and 9 negative"),
        ([1] * 9 + [-1] * 7, "9 positive and 7 negative"),
    ],
)
def test_one_class_or_too_few_rows_are_refused_with_counts(labels, message):
    with pytest.raises(DataError, match=f"{message} rows in the train split"):
        make(labels).require_both_classes()


def test_enough_rows_of_both_classes_pass():
    make([1] * 8 + [-1] * 8).require_both_classes()
    make([1, -1], splits=["validation"] * 2).require_both_classes("validation", min_rows=1)


@pytest.mark.parametrize(
    ("prompt", "answer", "text", "start"),
    [
        ("", "A text.", "A text.", 0),
        ("Q:", "yes", "Q: yes", 3),
        ("Q:", " yes", "Q: yes", 3),
        ("Q: ", "yes", "Q: yes", 3),
        ("Q:\n", "yes", "Q:\nyes", 3),
        ("yes", "yes", "yes yes", 4),
    ],
)
def test_plain_rendering(prompt, answer, text, start):
    assert render(one(prompt, answer), tokenizer(None)) == [RenderedText(text, start, False)]


def test_a_chat_template_makes_two_turns_and_ends_with_the_answer():
    (rendered,) = render(one("Is it?", "Yes"), tokenizer(CHATML), chat_template=True)
    expected = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nYes"
    assert rendered == RenderedText(expected, len(expected) - 3, True, "Is it? Yes")


# Each also occurs in the marks after the answer, in those before it, or in the prompt.
@pytest.mark.parametrize("answer", ["d", "end", "im", "assistant", "user", "Which letter?"])
def test_an_answer_that_also_occurs_elsewhere_is_found_in_its_turn(answer):
    (rendered,) = render(one("Which letter?", answer), tokenizer(CHATML), chat_template=True)
    assert rendered.text.endswith(f"<|im_start|>assistant\n{answer}")
    assert rendered.text[rendered.answer_start :] == answer


def test_a_text_without_prompt_becomes_a_turn_that_awaits_an_answer():
    (rendered,) = render(one("", "A text."), tokenizer(CHATML), chat_template=True)
    expected = "<|im_start|>user\nA text.<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == RenderedText(expected, 0, True, "A text.")


def test_a_model_without_chat_template_is_refused():
    with pytest.raises(DataError, match=r"has none.*base models\. Leave the chat template off"):
        render(one("", "A text."), tokenizer(None), chat_template=True)


def test_a_template_that_rewrites_the_answer_is_refused():
    shouting = "{% for turn in messages %}{{ turn['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites the answer 'yes'"):
        render(one("Q", "yes"), tokenizer(shouting), chat_template=True)
