"""Answers of free form: loaded, generated, extracted and matched."""

from __future__ import annotations

import json

import pytest
import torch

from expertsteer.data import load_examples
from expertsteer.data.answers import same_answer
from expertsteer.errors import DataError, ParameterError
from expertsteer.evaluation import evaluate, load_task
from expertsteer.evaluation.multiple_choice import ChoiceTask
from expertsteer.evaluation.open_answers import (
    OpenQuestion,
    OpenTask,
    answer_questions,
    extract_answer,
    load_open_questions,
)
from helpers import CONTEXT, tiny_language_model


@pytest.fixture
def path(tmp_path):
    rows = [
        {
            "id": f"item {n}",
            "question": f"w{n} w{n + 1}",
            "answer": str(n),
            "rationale": f"w{n}" if n % 2 else None,
            "split": "test" if n < 6 else "train",
        }
        for n in range(10)
    ]
    file = tmp_path / "open.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("Twice 3 is 6. The answer is 6.", "6"),
        ("so the answer is: $1,200.50\nQuestion", "$1,200.50"),
        ("first 4 then 7\n#### 11", "11"),
        (r"hence \boxed{\frac{1}{2}} units", r"\frac{1}{2}"),
        ("we need 12 apples and 15 pears", "15"),
        (" Paris \nand more", "Paris"),
        ("", ""),
    ],
)
def test_the_answer_is_found_in_what_was_written(generated, expected):
    assert extract_answer(generated) == expected


@pytest.mark.parametrize(
    ("found", "right", "same"),
    [
        ("$1,200.50", "1200.5", True),
        ("1/2", r"\frac{1}{2}", True),
        ("50%", "50", True),
        ("13", "12", False),
        ("", "12", False),
        ("1/0", "12", False),
        ("paris", "Paris.", True),
        ("x + 1", "$x+1$", True),
        ("12", "Paris", False),
        (".5", "0.5", True),
        (".5", "5", False),
        ("-.25", "-1/4", True),
        (r"50\%", "50", True),
        (r"$50\%$", "50%", True),
        (r"\$18.90", "18.9", True),
        ("-$5", "-5", True),
        ("12 apples", "12", False),
        ("18.", "18", True),
        ("1 000", "1,000", True),
        ("Nan", "nan.", True),
        ("infinity", "Infinity", True),
        ("1e400", "12", False),
    ],
)
def test_answers_are_matched_as_numbers_or_text(found, right, same):
    assert same_answer(found, right) is same


def test_shots_come_from_the_train_split_and_hold_their_rationale(path):
    questions = load_open_questions(path, n_shots=4, limit=3, seed=1)
    assert len(questions) == 3
    assert questions[0].prompt.count("Question:") == 5
    assert "Answer: w7 The answer is 7.\n\n" in questions[0].prompt
    assert questions[0].prompt.endswith("\nAnswer:")
    assert all(int(question.answer) < 6 for question in questions)
    with pytest.raises(DataError, match="4 solved questions"):
        load_open_questions(path, n_shots=5)
    with pytest.raises(ParameterError, match="train split"):
        load_open_questions(path, split="train", n_shots=1)
    with pytest.raises(DataError, match=r"'validation'.*test, train"):
        load_open_questions(path, split="validation")


def test_a_row_without_an_answer_is_named(tmp_path):
    file = tmp_path / "open.jsonl"
    file.write_text('{"question": "w1", "answer": "2"}\n{"question": "w1", "answer": ""}\n')
    with pytest.raises(DataError, match=r"open\.jsonl:2"):
        load_open_questions(file)


def test_answers_in_a_batch_are_those_of_each_question_alone():
    model = tiny_language_model("llama")
    questions = [OpenQuestion(f"{n}", "w3 " * n + "w4", "1") for n in range(1, 6)]
    settings = {"max_new_tokens": 6, "progress": False}
    together = {r["name"]: r["generated"] for r in answer_questions(model, questions, **settings)}
    for question in questions:
        (alone,) = answer_questions(model, [question], **settings)
        assert together[question.name] == alone["generated"]
        ids = model.tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        text = model.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert alone["generated"] == text


def test_an_answer_that_reaches_the_most_tokens_is_unfinished(monkeypatch):
    model = tiny_language_model("llama")
    question = OpenQuestion("one", "w3 w4", "1")
    ids = model.tokenizer(question.prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    written = tokens[0, ids.shape[1] :].tolist()
    for ends, unfinished in ((None, True), (written[-1], False), ([10**6, written[0]], False)):
        monkeypatch.setattr(model.model.generation_config, "eos_token_id", ends)
        (row,) = answer_questions(model, [question], max_new_tokens=6, progress=False)
        assert row["is_unfinished"] is unfinished


def test_prompts_that_do_not_fit_are_counted_and_room_is_checked():
    model = tiny_language_model("llama")
    long = OpenQuestion("long", "w3 " * (CONTEXT + 1), "1")
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        (row,) = answer_questions(model, [long], max_new_tokens=4, progress=False)
    assert row["is_cut"] is True
    with pytest.raises(ParameterError, match=f"holds {CONTEXT}"):
        answer_questions(model, [long], max_new_tokens=CONTEXT, progress=False)


def test_open_questions_are_evaluated_and_continued(path, tmp_path):
    model = tiny_language_model("llama")
    task = load_task(path, model, max_new_tokens=4, batch_size=2)
    assert isinstance(task, OpenTask)
    result = evaluate(model, task, tmp_path / "out", progress=False)
    assert (result.n_questions, result.n_cut) == (6, 0)
    assert set(result.measurements[0.0]) == {"exact_match"}
    rows = tmp_path / "out" / "rows.jsonl"
    whole = sorted(rows.read_text().splitlines())
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    evaluate(model, task, tmp_path / "out", progress=False)
    assert sorted(rows.read_text().splitlines()) == whole


def test_rows_with_choices_are_multiple_choice(tmp_path):
    file = tmp_path / "choices.jsonl"
    row = {"question": "w1", "choices": ["w2", "w3"], "answer": 0, "split": "test"}
    file.write_text(json.dumps(row) + "\n")
    assert isinstance(load_task(file, tiny_language_model("llama")), ChoiceTask)


def test_a_file_without_splits_is_divided_as_for_fitting(tmp_path):
    file = tmp_path / "open.jsonl"
    rows = [{"question": f"w{n}", "answer": str(n)} for n in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(file, seed=3).split("test")
    asked = [question.prompt for question in load_open_questions(file, seed=3)]
    assert list(dict.fromkeys(examples.prompts)) == asked
    assert len(asked) == 10


def test_another_split_may_serve_as_the_test(path):
    questions = load_open_questions(path, roles={"test": "train"})
    assert [question.answer for question in questions] == ["6", "7", "8", "9"]


@pytest.mark.parametrize("kind", ["open_answer", "true_false"])
def test_the_limit_of_a_task_is_at_least_one(tmp_path, kind):
    file = tmp_path / "rows.jsonl"
    row = {"question": "w1", "answer": "2", "text": "w3", "label": 1, "split": "test"}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ParameterError, match="limit=0"):
        load_task(file, tiny_language_model("llama"), kind=kind, limit=0)


def test_the_file_of_a_task_is_read_once(path, monkeypatch):
    from expertsteer.data import formats

    reads = []

    def read(*arguments):
        reads.append(arguments)
        return read_rows(*arguments)

    read_rows = formats.read_rows
    monkeypatch.setattr(formats, "read_rows", read)
    load_task(path, tiny_language_model("llama"))
    assert len(reads) == 1


def test_settings_that_a_kind_has_no_use_of_are_refused(path, tmp_path):
    model = tiny_language_model("llama")
    file = tmp_path / "choices.jsonl"
    row = {"question": "w1", "choices": ["w2", "w3"], "answer": 0, "split": "test"}
    file.write_text(json.dumps(row) + "\n")
    for setting in ({"n_shots": 5}, {"max_new_tokens": 9}):
        ((name, value),) = setting.items()
        with pytest.raises(ParameterError, match=rf"{name}={value} for choices\.jsonl.*likelihood"):
            load_task(file, model, **setting)
    with pytest.raises(ParameterError, match=r"letters=True for .* answered in words"):
        load_task(path, model, letters=True)


def test_ids_and_splits_that_would_lose_questions_are_refused(tmp_path):
    file = tmp_path / "open.jsonl"
    rows = [{"id": n % 2, "question": f"w{n}", "answer": "1", "split": "test"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="the id '0' in several rows"):
        load_open_questions(file)
    rows = [{"question": f"w{n}", "answer": "1", "split": "test" if n else None} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="a split in some rows only"):
        load_open_questions(file)
