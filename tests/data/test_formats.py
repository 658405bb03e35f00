from __future__ import annotations

import csv
import json
import warnings

import pytest

from expertsteer.data import LabelledExamples, load_examples, shipped_file
from expertsteer.errors import DataError, ParameterError

QUESTION = {"question": "Capital of France?", "choices": ["Rome", "Paris", "Bonn"]}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows: dict):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write_rows


def texts(n: int, **fields) -> list[dict]:
    return [{"text": f"text {row}", "label": row % 2} | fields for row in range(n)]


def triples(examples: LabelledExamples) -> list[tuple[str, str, int]]:
    return list(zip(examples.prompts, examples.answers, examples.labels.tolist(), strict=True))


@pytest.mark.parametrize("positive", [1, 1.0, "1", "+1", True, "true", "Positive", "YES", " yes"])
@pytest.mark.parametrize("negative", [0, -1, 0.0, "0", "-1", False, "False", "negative", "No"])
def test_label_values(write, positive, negative):
    path = write({"text": "a", "label": positive}, {"text": "b", "label": negative})
    assert triples(load_examples(path)) == [("", "a", 1), ("", "b", -1)]


@pytest.mark.parametrize("value", [2, -2, 0.5, "maybe", [1]])
def test_a_label_out_of_range_is_named_with_its_line(write, value):
    path = write({"text": "a", "label": 1}, {"text": "b", "label": value})
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: got the label .*expected 1 or 0"
    ) as caught:
        load_examples(path)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), "", " ", "NaN", None])
@pytest.mark.parametrize("positive", [None, "joy"])
def test_a_missing_label_is_refused_and_never_counts_as_negative(write, value, positive):
    path = write({"text": "a", "label": positive or 1}, {"text": "b", "label": value})
    with pytest.raises(DataError, match=r"data\.jsonl:2: got (no|the) label.*in every row"):
        load_examples(path, positive=positive)


EMOTIONS = [
    {"text": "a", "emotion": "joy"},
    {"text": "b", "emotion": "sadness"},
    {"text": "c", "emotion": "anger"},
]


def test_two_label_values_leave_the_others_out(write):
    examples = load_examples(
        write(*EMOTIONS), columns={"label": "emotion"}, positive="Joy", negative="sadness"
    )
    assert triples(examples) == [("", "a", 1), ("", "b", -1)]
    assert examples.n_left_out == 1
    assert examples.subset([0]).n_left_out == 1


def test_one_label_value_makes_all_others_negative(write):
    examples = load_examples(write(*EMOTIONS), columns={"label": "emotion"}, positive="joy")
    assert examples.labels.tolist() == [1, -1, -1]
    assert examples.n_left_out == 0


def test_label_values_that_do_not_occur_name_those_that_do(write):
    with pytest.raises(DataError, match=r"'fear' or 'awe'\. Its labels are anger, joy, sadness"):
        load_examples(
            write(*EMOTIONS), columns={"label": "emotion"}, positive="fear", negative="awe"
        )


def test_negative_without_positive_is_refused(write):
    with pytest.raises(ParameterError, match="without positive"):
        load_examples(write(*texts(2)), negative="0")


def test_pairs_share_a_group(write):
    path = write(
        {"positive": "good", "negative": "bad"},
        {"prompt": "Q", "positive": "yes", "negative": "no"},
    )
    examples = load_examples(path)
    assert triples(examples) == [
        ("", "good", 1),
        ("", "bad", -1),
        ("Q", "yes", 1),
        ("Q", "no", -1),
    ]
    assert examples.groups[0] == examples.groups[1] != examples.groups[2] == examples.groups[3]


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "Paris", " Paris "])
def test_multiple_choice_takes_index_letter_or_text(write, answer):
    examples = load_examples(write(QUESTION | {"answer": answer}))
    prompt = "Question: Capital of France?\nAnswer:"
    assert triples(examples) == [(prompt, "Rome", -1), (prompt, "Paris", 1), (prompt, "Bonn", -1)]
    assert len(set(examples.groups)) == 1


def test_the_context_stands_before_the_question(write):
    examples = load_examples(write(QUESTION | {"answer": 1, "context": "An atlas. \n"}))
    assert examples.prompts[0] == "An atlas.\nQuestion: Capital of France?\nAnswer:"


def test_a_choice_with_the_answers_text_goes_before_one_with_its_index(write):
    path = write({"question": "1 + 1?", "choices": ["1", "3", "2"], "answer": "2"})
    assert load_examples(path).labels.tolist() == [-1, -1, 1]


@pytest.mark.parametrize(("names", "answer"), [("ABC", "B"), ("123", "2"), ("EFG", "F")])
def test_choices_that_bring_names_are_answered_by_name(write, names, answer):
    choices = {"text": QUESTION["choices"], "label": list(names)}
    examples = load_examples(write({"question": "Q", "choices": choices, "answer": answer}))
    assert examples.labels.tolist() == [-1, 1, -1]


@pytest.mark.parametrize("answer", [3, -1, "3", "D", "Oslo", 1.5, True, "²", "é"])
def test_an_answer_out_of_range_is_refused(write, answer):
    path = write(QUESTION | {"answer": 0}, QUESTION | {"answer": answer})
    with pytest.raises(DataError, match=r"data\.jsonl:2: got answer=.*index from 0 to 2"):
        load_examples(path)


@pytest.mark.parametrize("choices", ["Rome", ["Rome"], [], 3, {"label": ["A", "B"]}])
def test_choices_that_are_no_list_of_two_or_more_are_refused(write, choices):
    with pytest.raises(DataError, match=r"data\.jsonl:1: got choices=.*two or more"):
        load_examples(write({"question": "Q", "choices": choices, "answer": 0}))


@pytest.mark.parametrize("choice", [None, " ", float("nan")])
def test_a_choice_without_text_is_refused(write, choice):
    with pytest.raises(DataError, match=r"data\.jsonl:1: got choice=.*expected some text"):
        load_examples(write({"question": "Q", "choices": ["Rome", choice], "answer": 0}))


def test_choices_may_be_numbers_and_truth_values(write):
    rows = [{"question": "Q", "choices": c, "answer": 0} for c in ([4, 5.5], [True, False])]
    assert load_examples(write(*rows)).answers == ("4", "5.5", "True", "False")


def test_a_statement_has_both_answers(write):
    examples = load_examples(
        write({"prompt": "P", "matches": " Yes"}, {"prompt": "Q", "matches": " No"})
    )
    assert triples(examples) == [("P", "Yes", 1), ("P", "No", -1), ("Q", "Yes", -1), ("Q", "No", 1)]
    assert examples.groups[0] == examples.groups[1] != examples.groups[2]


def test_a_statement_needs_yes_or_no(write):
    with pytest.raises(DataError, match=r"data\.jsonl:1: got matches='perhaps'"):
        load_examples(write({"prompt": "P", "matches": "perhaps"}))


def test_a_statement_may_be_read_as_labelled_text(write):
    path = write({"prompt": "P", "text": "a", "matches": " Yes"})
    examples = load_examples(path, kind="labelled", columns={"text": "text", "label": "matches"})
    assert triples(examples) == [("", "a", 1)]


def test_prompt_answer(write):
    path = write({"prompt": "P", "answer": "a", "label": 1, "text": "unused"})
    assert triples(load_examples(path)) == [("P", "a", 1)]


def test_unknown_columns_name_what_there_is_and_what_is_needed(write):
    with pytest.raises(DataError, match=r"columns body, mood, .*labelled: text, label") as caught:
        load_examples(write({"body": "a", "mood": 1}))
    assert "pairs: positive, negative" in str(caught.value)


def test_a_kind_that_does_not_fit_names_its_needs(write):
    with pytest.raises(DataError, match=r"columns label, text, but expected those of pairs"):
        load_examples(write(*texts(2)), kind="pairs")


def open_rows(answers: list[str], **fields) -> list[dict]:
    return [{"question": f"Q{n}?", "answer": a} | fields for n, a in enumerate(answers)]


def test_a_wrong_open_answer_is_that_to_another_question_of_the_split(write):
    answers = [str(n // 2) for n in range(40)]  # two questions share each answer
    rows = open_rows(answers[:20], split="train") + open_rows(answers[20:], split="test")
    examples = load_examples(write(*rows))
    assert triples(examples)[0] == ("Question: Q0?\nAnswer:", "The answer is 0", 1)
    assert examples.labels.tolist() == [1, -1] * 40
    right, wrong = examples.answers[::2], examples.answers[1::2]
    assert right == tuple(f"The answer is {answer}" for answer in answers)
    assert all(r != w for r, w in zip(right, wrong, strict=True))
    assert set(wrong[:20]) <= set(right[:20])
    assert set(wrong[20:]) <= set(right[20:])
    assert len(set(wrong[:20])) > 4
    assert examples.groups[::2] == examples.groups[1::2]
    assert len(set(examples.groups)) == 40
    assert load_examples(write(*rows)).answers == examples.answers
    assert load_examples(write(*rows), seed=1).answers != examples.answers


def test_an_equal_answer_of_another_form_is_not_a_wrong_one(write):
    examples = load_examples(write(*open_rows(["1,200", "$1200", "1200.0", "7"], split="test")))
    assert examples.answers[1:6:2] == ("The answer is 7",) * 3


def test_questions_that_all_have_one_answer_have_no_wrong_one(write):
    path = write(*open_rows(["72", "72.0"], split="train"))
    with pytest.raises(DataError, match=r"Got '72' as the answer to every question.* train split"):
        load_examples(path)


def test_true_false_is_a_question_and_has_to_be_asked_for(write):
    path = write({"text": "Ice is cold.", "label": 1}, {"text": "Ice is hot.", "label": "no"})
    assert triples(load_examples(path))[0] == ("", "Ice is cold.", 1)
    prompt = 'Is the following statement true or false?\n"{}"\nAnswer:'
    assert triples(load_examples(path, kind="true_false")) == [
        (prompt.format("Ice is cold."), "True", 1),
        (prompt.format("Ice is cold."), "False", -1),
        (prompt.format("Ice is hot."), "True", -1),
        (prompt.format("Ice is hot."), "False", 1),
    ]


def test_an_unknown_kind_is_refused(write):
    with pytest.raises(ParameterError, match="kind='labeled', but expected auto or one of"):
        load_examples(write(*texts(2)), kind="labeled")


def test_a_column_that_is_not_there_names_those_that_are(write):
    with pytest.raises(DataError, match=r"column 'mood' for 'label', .* columns label, text"):
        load_examples(write(*texts(2)), columns={"label": "mood"})


def test_a_column_for_an_unknown_field_is_refused(write):
    with pytest.raises(ParameterError, match=r"columns for 'txt', but expected one of .*text"):
        load_examples(write(*texts(2)), columns={"txt": "text"})


def test_columns_may_swap_two_fields(write):
    path = write({"positive": "bad", "negative": "good"})
    examples = load_examples(path, columns={"positive": "negative", "negative": "positive"})
    assert triples(examples) == [("", "good", 1), ("", "bad", -1)]


@pytest.mark.parametrize("value", ["", "  ", True, [1], float("nan")])
def test_a_text_that_is_none_is_refused(write, value):
    with pytest.raises(DataError, match=r"data\.jsonl:2: got text=.*expected some text"):
        load_examples(write({"text": "a", "label": 1}, {"text": value, "label": 0}))


def test_half_a_character_is_refused(write):
    with pytest.raises(DataError, match=r"data\.jsonl:1: got text with half a character"):
        load_examples(write({"text": "a\ud83d", "label": 1}))


def test_a_field_missing_in_one_row_is_named_with_its_line(write):
    with pytest.raises(DataError, match=r"data\.jsonl:2: got no text"):
        load_examples(write({"text": "a", "label": 1}, {"label": 0}))


@pytest.mark.parametrize(
    ("given", "kept"),
    [("train", "train"), ("valid", "validation"), ("dev", "validation"), ("Test", "test")],
)
def test_splits_of_the_file_are_kept(write, given, kept):
    assert set(load_examples(write(*texts(20, split=given))).splits) == {kept}


def test_an_unknown_split_is_named_with_its_line(write):
    path = write(*texts(2, split="train"), *texts(1, split="holdout"))
    with pytest.raises(DataError, match=r"data\.jsonl:3: got split='holdout'"):
        load_examples(path)


def test_a_split_in_some_rows_only_is_refused(write):
    with pytest.raises(DataError, match="a split in some rows only"):
        load_examples(write(*texts(4, split="test"), {"text": "z", "label": 1}))


def test_a_group_in_two_splits_of_the_file_is_refused(write):
    path = write(*texts(2, split="train", group="g"), *texts(2, split="test", group="g"))
    with pytest.raises(DataError, match="group 'g'"):
        load_examples(path)


def test_drawn_splits_have_their_shares_of_both_classes(write):
    rows = [{"text": f"t{row}", "label": int(row < 40)} for row in range(140)]
    examples = load_examples(write(*rows))
    for name, n_positive, n_negative in [
        ("train", 24, 60),
        ("validation", 8, 20),
        ("test", 8, 20),
    ]:
        labels = examples.split(name).labels
        assert ((labels > 0).sum(), (labels < 0).sum()) == (n_positive, n_negative)


def test_drawn_splits_depend_on_the_seed_alone(write):
    path = write(*texts(60))
    first = load_examples(path)
    assert load_examples(path).splits == first.splits
    assert load_examples(path, seed=1).splits != first.splits


def test_drawn_splits_keep_questions_together(write):
    examples = load_examples(
        write(*[QUESTION | {"question": f"{n}?", "answer": 0} for n in range(30)])
    )
    assert len(set(zip(examples.groups, examples.splits, strict=True))) == 30
    assert set(examples.splits) == {"train", "validation", "test"}


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], ["a", "b", "c", "d", "e", "f"]])
def test_drawn_splits_keep_groups_of_the_file_together(write, groups):
    rows = [row | {"group": groups[n // 4]} for n, row in enumerate(texts(24))]
    examples = load_examples(write(*rows))
    assert examples.groups == tuple(str(groups[n // 4]) for n in range(24))
    assert len(set(zip(examples.groups, examples.splits, strict=True))) == 6


def test_rows_with_an_empty_group_are_groups_of_their_own(write):
    examples = load_examples(write(*texts(6, group=None), *texts(6, group="")))
    assert len(set(examples.groups)) == 12


def test_a_column_may_be_the_group(write):
    path = write(*texts(4, topic="t"))
    assert set(load_examples(path, columns={"group": "topic"}).groups) == {"t"}


def test_split_fractions(write):
    examples = load_examples(write(*texts(20)), split_fractions=(0.5, 0.0, 0.5))
    assert examples.describe_splits() == "10 train, 10 test"


@pytest.mark.parametrize(
    "fractions", [(0.6, 0.2, 0.1), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)]
)
def test_split_fractions_out_of_range_are_refused(write, fractions):
    with pytest.raises(ParameterError, match="sum to 1"):
        load_examples(write(*texts(4)), split_fractions=fractions)


def test_limit_draws_rows_by_seed_and_keeps_their_order(write):
    path = write(*texts(50))
    some = load_examples(path, limit=10)
    numbers = [int(answer.split()[1]) for answer in some.answers]
    assert len(numbers) == 10
    assert numbers == sorted(numbers) != list(range(10))
    assert load_examples(path, limit=10).answers == some.answers
    assert load_examples(path, limit=10, seed=1).answers != some.answers
    assert len(load_examples(path, limit=99)) == 50


def test_limit_out_of_range_is_refused(write):
    with pytest.raises(ParameterError, match="limit=0"):
        load_examples(write(*texts(4)), limit=0)


def test_a_text_with_both_labels_is_kept_and_counted_in_a_warning(write):
    path = write(*[{"text": "same", "label": label} for label in (1, 0, 1)])
    with pytest.warns(UserWarning, match=r"1 texts of .*data\.jsonl occur with both labels"):
        examples = load_examples(path)
    assert len(examples) == 3


def test_a_text_twice_with_one_label_is_no_warning(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_examples(write(*[{"text": "same", "label": 1}] * 2, {"text": "other", "label": 0}))


def test_csv(tmp_path):
    path = tmp_path / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], ["a, b", "1"], ["c", "0"]])
    assert triples(load_examples(path)) == [("", "a, b", 1), ("", "c", -1)]


def test_one_class_loads_but_does_not_fit(write):
    examples = load_examples(write(*[{"text": f"t{n}", "label": 1} for n in range(40)]))
    with pytest.raises(DataError, match="24 positive and 0 negative"):
        examples.require_both_classes()


def test_the_shipped_examples_can_be_fitted_on():
    examples = load_examples(shipped_file("sentiment.jsonl"))
    for name in ("train", "validation", "test"):
        examples.require_both_classes(name)


def test_a_limit_leaves_the_splits_of_the_rows_as_they_are(write):
    path = write(*texts(50))
    whole = load_examples(path)
    splits = dict(zip(whole.answers, whole.splits, strict=True))
    some = load_examples(path, limit=20)
    assert len(some) == 20
    assert all(splits[a] == split for a, split in zip(some.answers, some.splits, strict=True))


@pytest.mark.parametrize("index", [-1, 3])
def test_an_answer_index_out_of_range_names_the_line(write, index):
    path = write(QUESTION | {"answer": 0}, QUESTION | {"answer": index})
    with pytest.raises(DataError, match=rf"data\.jsonl:2: got answer={index}, .* from 0 to 2"):
        load_examples(path)


# Roles of splits ------------------------------------------------------------------------

FOLDS = [
    {"text": f"{split} {n}", "label": n % 2, "split": split}
    for split in ("train", "auxiliary_train", "validation_matched", "test", "fold3")
    for n in range(2)
]


def texts_of(examples: LabelledExamples) -> dict[str, list[str]]:
    return {
        name: [a for a, s in zip(examples.answers, examples.splits, strict=True) if s == name]
        for name in dict.fromkeys(examples.splits)
    }


def test_known_names_of_the_hub_have_their_role(write):
    assert texts_of(load_examples(write(*FOLDS[:8]))) == {
        "train": ["train 0", "train 1", "auxiliary_train 0", "auxiliary_train 1"],
        "validation": ["validation_matched 0", "validation_matched 1"],
        "test": ["test 0", "test 1"],
    }


def test_an_unknown_name_of_a_split_asks_for_its_role(write):
    with pytest.raises(DataError, match=r"jsonl:9: got split='fold3'.* \(--role test=SPLIT\)"):
        load_examples(write(*FOLDS))


def test_a_split_that_is_given_a_role_serves_as_that_alone(write):
    roles = {"test": "fold3", "train": "auxiliary_train"}
    assert texts_of(load_examples(write(*FOLDS), roles=roles)) == {
        "train": ["auxiliary_train 0", "auxiliary_train 1"],
        "validation": ["validation_matched 0", "validation_matched 1"],
        "test": ["fold3 0", "fold3 1"],
    }


@pytest.mark.parametrize(
    ("roles", "error", "says"),
    [
        ({"exam": "test"}, ParameterError, "Got the role 'exam', but expected one of train"),
        ({"train": "fold3", "test": "fold3"}, ParameterError, "each split to serve as one"),
        ({"test": "fold4"}, DataError, "Got the split 'fold4' as test, but .* splits aux.*, fold3"),
    ],
)
def test_roles_that_do_not_fit_are_refused(write, roles, error, says):
    with pytest.raises(error, match=says):
        load_examples(write(*FOLDS), roles=roles)
