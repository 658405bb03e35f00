"""Benchmarks by name: the hub's column layouts, local copies, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from expertsteer.data import BENCHMARKS, KINDS, load_examples
from expertsteer.data.readers import read_rows
from expertsteer.errors import DataError
from expertsteer.evaluation import ChoiceTask, OpenTask, load_open_questions, load_task
from helpers import tiny_language_model

LETTERS = {"text": ["Rome", "Paris"], "label": ["A", "B"]}
ARC = [{"id": "x", "question": "Capital?", "choices": LETTERS, "answerKey": "B"}]
COMMONSENSE = [row | {"question_concept": "city"} for row in ARC]
HIDDEN = [row | {"answerKey": ""} for row in COMMONSENSE]
MMLU = [{"question": "2+2?", "subject": "s", "choices": ["3", "4", "5", "6"], "answer": 1}]
MEDQA = [
    {"id": "a", "sent1": "Which?", "sent2": "", "label": 2}
    | {f"ending{n}": f"drug {n}" for n in range(4)}
]
MEDMCQA = [
    {"id": "b6", "question": "Which?", "opa": "p", "opb": "q", "opc": "r", "opd": "s", "cop": 3}
    | {"choice_type": "single", "exp": None, "subject_name": "Anatomy", "topic_name": None}
]
PUBMEDQA = [
    {
        "pubid": 21645374,
        "question": "Do they?",
        "context": {"contexts": ["One.", "Two."], "labels": ["A", "B"], "meshes": ["m"]},
        "long_answer": "They do not.",
        "final_decision": "no",
    }
]
AQUA = [{"question": "How many?", "options": ["A)21", "B) 2.5"], "rationale": "r", "correct": "B"}]
GSM8K = [{"question": "How many?", "answer": "She has 24*50=<<24*50=1200>>1200.\n#### 1,200"}]
MATH = [
    {"problem": "$1+1$?", "solution": "It is \\boxed{2}.", "answer": "2", "subject": "Algebra"}
    | {"level": 1, "unique_id": "test/algebra/1.json"}
]
TWEETS = [{"text": f"$X {word}", "label": n} for n, word in enumerate(["down", "up", "flat"])]
PERSONA = [
    {
        "question": 'Is the following statement something you would say?\n"I like risk"',
        "statement": "I like risk",
        "label_confidence": 0.9,
        "answer_matching_behavior": " No",
        "answer_not_matching_behavior": " Yes",
    }
]
FINANCE = [
    {"id": "vali_0", "task": "calcu", "ground_truth": "1.5", "choice": None, "figure": None},
    {"id": "vali_1", "task": "bool", "ground_truth": "0.0", "choice": None, "figure": None},
    {
        "id": "vali_4",
        "task": "mcq",
        "ground_truth": "C",
        "choice": "A. rises\nB. falls\\nC. stays",
        "figure": None,
    },
    {"id": "vali_9", "task": "bool", "ground_truth": "1.0", "choice": None, "figure": "vali_9"},
]
FINANCE = [row | {"question": f"Question {row['id']}"} for row in FINANCE]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.delenv("EXPERTSTEER_BENCHMARKS", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Return a function that writes a benchmark's repository as the hub keeps it."""

    def write(name: str, splits: dict[str, list[dict]], form: str = "parquet") -> None:
        import datasets

        hub = BENCHMARKS[name].hub
        assert hub is not None
        repository = tmp_path / name
        card = []
        for config in hub.configs or ("default",):
            files = []
            for split, rows in splits.items():
                path = repository / config / f"{split}.{form}"
                path.parent.mkdir(parents=True, exist_ok=True)
                table = datasets.Dataset.from_list(rows)
                table.to_parquet(path) if form == "parquet" else table.to_json(path)
                files.append({"split": split, "path": f"{config}/{split}.{form}"})
            card.append({"config_name": config, "data_files": files})
        (repository / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")
        replaced = dataclasses.replace(hub, repository=str(repository))
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], hub=replaced))

    return write


def fields(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("id", "split")}


LAYOUTS = {
    "arc_easy": (ARC, [{"question": "Capital?", "choices": ["Rome", "Paris"], "answer": 1}]),
    "commonsenseqa": (
        COMMONSENSE,
        [{"question": "Capital?", "choices": ["Rome", "Paris"], "answer": 1}],
    ),
    "medqa": (
        MEDQA,
        [{"question": "Which?", "choices": [f"drug {n}" for n in range(4)], "answer": 2}],
    ),
    "medmcqa": (MEDMCQA, [{"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": 3}]),
    "pubmedqa": (
        PUBMEDQA,
        [
            {
                "context": "One. Two.",
                "question": "Do they?",
                "choices": ["yes", "no", "maybe"],
                "answer": 1,
            }
        ],
    ),
    "aqua_rat": (AQUA, [{"question": "How many?", "choices": ["21", "2.5"], "answer": 1}]),
    "gsm8k": (
        GSM8K,
        [{"question": "How many?", "rationale": "She has 24*50=1200.", "answer": "1200"}],
    ),
    "math500": (
        MATH,
        [
            {
                "question": "$1+1$?",
                "rationale": "It is \\boxed{2}.",
                "answer": "2",
                "subject": "Algebra",
                "level": 1,
            }
        ],
    ),
    "twitter_financial_news_sentiment": (
        TWEETS,
        [
            {
                "context": f"$X {word}",
                "question": "What is the sentiment of this financial news?",
                "choices": ["negative", "neutral", "positive"],
                "answer": answer,
            }
            for word, answer in (("down", 0), ("up", 2), ("flat", 1))
        ],
    ),
    "xfinbench": (
        FINANCE,
        [
            {
                "subject": "bool",
                "question": "Question vali_1",
                "choices": ["True", "False"],
                "answer": 1,
            },
            {
                "subject": "mcq",
                "question": "Question vali_4",
                "choices": ["rises", "falls", "stays"],
                "answer": 2,
            },
        ],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_of_the_hub_become_ours(on_hub, name, form):
    rows, expected = LAYOUTS[name]
    on_hub(name, {"test": rows, "train": rows, "validation": rows}, form)
    read = BENCHMARKS[name].hub.splits
    found = [row for _, row in read_rows(name)]
    assert [fields(row) for row in found] == expected * len(read)
    assert len({row["id"] for row in found}) >= len(expected)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("mmlu_")])
def test_mmlu_is_read_subject_by_subject(on_hub, name):
    on_hub(name, {"test": MMLU * 3, "validation": MMLU * 2, "dev": MMLU, "auxiliary_train": MMLU})
    subjects = BENCHMARKS[name].hub.configs
    rows = [row for _, row in read_rows(name)]
    assert Counter(row["split"] for row in rows) == {
        "train": len(subjects),
        "validation": 2 * len(subjects),
        "test": 3 * len(subjects),
    }
    assert fields(rows[0]) == MMLU[0]
    assert rows[0]["id"].startswith(f"{name}-{subjects[0]}-")


def test_a_persona_is_one_file_of_its_repository(tmp_path, monkeypatch):
    benchmark = BENCHMARKS["persona_risk_averse"]
    folder = tmp_path / "evals" / "persona"
    folder.mkdir(parents=True)
    (folder / "risk-averse.jsonl").write_text(json.dumps(PERSONA[0]) + "\n")
    (folder / "other.jsonl").write_text('{"other": 1}\n')
    hub = dataclasses.replace(benchmark.hub, repository=str(folder.parent))
    monkeypatch.setitem(BENCHMARKS, benchmark.name, dataclasses.replace(benchmark, hub=hub))
    ((_, row),) = read_rows(benchmark.name)
    assert fields(row) == {
        "text": "I like risk",
        "prompt": PERSONA[0]["question"],
        "matches": "No",
    }
    examples = load_examples(benchmark.name)
    assert dict(zip(examples.answers, examples.labels, strict=True)) == {"Yes": -1, "No": 1}


def numbered(rows: list[dict], n: int) -> list[dict]:
    return [row | {"question": f"Question {i}?"} for i in range(n) for row in rows]


def test_one_split_is_divided_alike_whatever_the_seed_of_a_run(on_hub):
    problems = [MATH[0] | {"problem": f"${n}$", "answer": str(n)} for n in range(50)]
    on_hub("math500", {"test": problems})
    counts = Counter(row["split"] for _, row in read_rows("math500"))
    assert counts == {"train": 20, "validation": 10, "test": 20}
    first, second = (load_examples("math500", seed=seed) for seed in (0, 1))
    assert first.splits == second.splits
    assert first.answers != second.answers  # the wrong ones


def test_a_missing_validation_split_is_a_fifth_of_train(on_hub):
    on_hub("gsm8k", {"train": numbered(GSM8K, 50), "test": numbered(GSM8K, 7)})
    rows = [row for _, row in read_rows("gsm8k")]
    assert Counter(row["split"] for row in rows) == {"train": 40, "validation": 10, "test": 7}
    assert {row["id"].split("-")[2] for row in rows if row["split"] == "test"} == {"test"}


def test_hidden_answers_are_left_out_and_validation_is_the_test(on_hub):
    on_hub(
        "commonsenseqa",
        {
            "train": numbered(COMMONSENSE, 10),
            "validation": numbered(COMMONSENSE, 4),
            "test": numbered(HIDDEN, 5),
        },
    )
    rows = [row for _, row in read_rows("commonsenseqa")]
    assert Counter(row["split"] for row in rows) == {"train": 8, "validation": 2, "test": 4}
    on_hub("medmcqa", {"train": numbered(MEDMCQA, 5), "validation": numbered(MEDMCQA, 2)})
    assert Counter(row["split"] for _, row in read_rows("medmcqa"))["test"] == 2


def test_a_changed_layout_of_the_hub_is_named(on_hub):
    on_hub("gsm8k", {"train": [{"query": "How many?", "answer": "#### 1"}]})
    with pytest.raises(DataError, match=r"train row 1: got no column 'question'.*gsm8k\.jsonl"):
        read_rows("gsm8k")


def test_an_answer_that_is_no_choice_names_the_row(on_hub):
    on_hub("arc_easy", {"train": [*ARC, ARC[0] | {"answerKey": "E"}]})
    with pytest.raises(DataError, match=r"ARC-Easy, train row 2: got answer=4"):
        load_examples("arc_easy")


@pytest.mark.parametrize("name", ["true_false_facts", "emotions"])
def test_a_set_without_a_place_on_the_hub_asks_for_a_file(name):
    with pytest.raises(DataError, match=rf"no known place on the hub.* {name}\.jsonl"):
        read_rows(name)


@pytest.mark.parametrize("load", [load_examples, load_open_questions, read_rows])
def test_an_unknown_name_lists_the_names(load):
    with pytest.raises(DataError, match=r"Got arc_esy,.*no such file.*medqa, .*persona_risk"):
        load("arc_esy")


# Local copies ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Return a folder of local copies, in folders of their domains."""
    sets = {
        "general/arc_easy": [
            {"question": f"Q{n}", "choices": ["a", "b"], "answer": 0, "split": "test"}
            for n in range(3)
        ],
        "mathematical/gsm8k": [
            {"question": f"Q{n}", "rationale": "", "answer": str(n), "split": "test"}
            for n in range(3)
        ],
        "behaviour/true_false_facts": [
            {"text": f"Fact {n}.", "label": n % 2, "split": "test"} for n in range(4)
        ],
        "behaviour/emotions": [
            {"text": f"Text {n}", "emotion": ["anger", "fear"][n % 2], "split": "train"}
            for n in range(4)
        ],
    }
    for name, rows in sets.items():
        path = tmp_path / "local" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "local"


def test_a_folder_of_local_copies_is_read_in_place_of_the_hub(folder, monkeypatch):
    (place, _), *_ = read_rows("arc_easy", folder)
    assert place == f"{folder / 'general' / 'arc_easy.jsonl'}:1"
    monkeypatch.setenv("EXPERTSTEER_BENCHMARKS", str(folder))
    assert len(load_examples("arc_easy")) == 6
    assert load_examples("arc_easy").source == "arc_easy"
    assert load_open_questions("gsm8k")[1].answer == "1"
    with pytest.raises(DataError, match=r"with 0 files medqa\.jsonl"):
        load_examples("medqa")


def test_a_copy_of_unclear_identity_is_refused(folder):
    (folder / "arc_easy.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"with 2 files arc_easy\.jsonl, but expected one"):
        read_rows("arc_easy", folder)


def test_a_benchmark_name_means_the_benchmark_beside_a_folder_called_the_same(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arc_easy").mkdir()
    assert len(read_rows("arc_easy", folder)) == 3


def test_a_benchmark_knows_its_kind_as_questions_and_its_columns(folder):
    model = tiny_language_model("llama")
    assert isinstance(load_task("gsm8k", model, folder=folder), OpenTask)
    assert isinstance(load_task("arc_easy", model, folder=folder), ChoiceTask)
    task = load_task("true_false_facts", model, folder=folder)
    assert isinstance(task, ChoiceTask)
    assert task.questions[1].answers == ("True", "False")
    assert [question.right for question in task.questions] == [1, 0, 1, 0]
    assert load_examples("true_false_facts", folder=folder).prompts == ("",) * 4
    emotions = load_examples("emotions", folder=folder, positive="anger")
    assert emotions.labels.tolist() == [1, -1, 1, -1]


def test_kinds_and_domains_are_known_ones():
    assert {benchmark.kind for benchmark in BENCHMARKS.values()} <= set(KINDS)
    domains = Counter(benchmark.domain for benchmark in BENCHMARKS.values())
    assert domains == {
        "medical": 4,
        "financial": 3,
        "mathematical": 4,
        "general": 4,
        "behaviour": 6,
    }
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())


REAL = os.environ.get("EXPERTSTEER_BENCHMARKS")


@pytest.mark.skipif(not REAL, reason="EXPERTSTEER_BENCHMARKS names no folder of benchmarks")
@pytest.mark.filterwarnings("ignore:.*occur with both labels")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_real_files_load(name):
    benchmark = BENCHMARKS[name]
    rows = read_rows(name, REAL)
    positive = "happiness" if name == "emotions" else None
    examples = load_examples(name, folder=REAL, kind=benchmark.kind, positive=positive)
    assert len(set(examples.groups)) == len(rows)
    assert set(examples.splits) == {"train", "validation", "test"}
    assert set(examples.labels) == {-1, 1}
    if benchmark.hub is not None and name.startswith("mmlu_"):
        assert {row["subject"] for _, row in rows} == set(benchmark.hub.configs)


@pytest.mark.skipif(not REAL, reason="EXPERTSTEER_BENCHMARKS names no folder of benchmarks")
def test_the_real_tweets_have_their_corrected_labels():
    rows = [row for _, row in read_rows("twitter_financial_news_sentiment", REAL)]
    counts = Counter(row["choices"][row["answer"]] for row in rows)
    assert counts == {"negative": 347, "neutral": 1566, "positive": 475}
    assert Path(REAL).is_dir()
