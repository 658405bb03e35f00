"""Tasks of the lm-evaluation-harness, unsteered and steered, kept and continued."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import yaml

from expertsteer.data import load_examples
from expertsteer.errors import DataError, ModelError, ParameterError
from expertsteer.evaluation import ChoiceTask, evaluate, evaluate_harness_tasks, questions_of
from expertsteer.pack import SteeringPack
from helpers import WORDS, random_vector, tiny_language_model

pytest.importorskip("lm_eval")

N_ITEMS = 12
LONG = " ".join(WORDS[n % 89] for n in range(150))
ROWS = [
    {
        "question": f"w{n} w{n + 1} w{n + 2}",
        "choices": [f"w{3 * n}", f"w{n + 7} w{n + 8}", f"w{n + 9} w1 w2"],
        "answer": (n + n // 5) % 3,
    }
    for n in range(N_ITEMS)
]
CHOICE = {
    "output_type": "multiple_choice",
    # What the package writes around a question, see `load_examples`.
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["w1"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
    "filter_list": [
        {"name": "first", "filter": [{"function": "take_first"}]},
        {
            "name": "word",
            "filter": [
                {"function": "regex", "regex_pattern": r"(w\d+)"},
                {"function": "take_first"},
            ],
        },
    ],
}
TASKS = {
    "tiny_choice": CHOICE,
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_written": WRITTEN,
    "tiny_missing": CHOICE | {"dataset_kwargs": {"data_files": {"test": "nowhere.json"}}},
    "tiny_coded": WRITTEN | {"unsafe_code": True},
    "tiny_long": CHOICE | {"dataset": "long"},
}
GROUP = {
    "group": "tiny_group",
    "task": ["tiny_choice", "tiny_long"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write the tasks and their data; return the folder."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.json").write_text("\n".join(map(json.dumps, ROWS)))
    long = [row | {"question": f"{LONG if n < 2 else ''} w{n}"} for n, row in enumerate(ROWS[:5])]
    (folder / "long.json").write_text("\n".join(map(json.dumps, long)))
    for name, task in TASKS.items():
        settings = dict(task)
        data = folder / f"{settings.pop('dataset', 'rows')}.json"
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        } | settings
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    (folder / "group.yaml").write_text(yaml.safe_dump(GROUP))
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets"
    )
    # It asks the machine for its drivers and compilers, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)


@pytest.fixture
def few_tasks(monkeypatch):
    """Keep the harness from reading its thousands of tasks."""
    import functools

    from lm_eval.tasks import TaskManager

    def own(**options):
        return TaskManager(**(options | {"include_defaults": False}))

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.wraps(TaskManager)(own))


@pytest.fixture(scope="module")
def pack():
    model = tiny_language_model("llama")
    return SteeringPack({1: random_vector()}, {1: 1.0}, model.description, strength=2.0)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder, output, tasks, **options):
    return evaluate_harness_tasks(
        tiny_language_model("llama"), tasks, output, include_path=folder, **options
    )


def test_figures_are_those_of_our_own_scoring_of_the_same_items(folder, pack, tmp_path):
    model = tiny_language_model("llama")
    found = run(folder, tmp_path / "theirs", ["tiny_choice"], pack=pack, strengths=[8.0, -8.0])
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row | {"split": "test"}) + "\n" for row in ROWS))
    questions = questions_of(load_examples(path), model)
    assert questions[0].prompt.strip() == "Question: w0 w1 w2\nAnswer:"
    ours = evaluate(
        model,
        ChoiceTask(tuple(questions)),
        tmp_path / "ours",
        pack=pack,
        strengths=[8.0, -8.0],
        progress=False,
    )
    task = found.tasks["tiny_choice"]
    assert (task.n_questions, task.n_cut) == (N_ITEMS, 0)
    assert list(task.measurements) == [0.0, 8.0, -8.0]
    for strength, metrics in task.measurements.items():
        assert set(metrics) == {"acc", "acc_norm"}
        for metric, measured in metrics.items():
            assert measured == ours.measurements[strength][metric]
    assert any(task.measurements[s][m].change for s in (8.0, -8.0) for m in ("acc", "acc_norm"))
    theirs = {(r["strength"], int(r["name"])): r for r in lines(tmp_path / "theirs/rows.jsonl")}
    assert len(theirs) == 3 * N_ITEMS
    order = {question.name: n for n, question in enumerate(questions)}
    for row in lines(tmp_path / "ours/rows.jsonl"):
        same = theirs[row["strength"], order[row["name"]]]
        likelihoods = [response[0][0] for response in same["resps"]]
        assert likelihoods == pytest.approx(row["log_likelihoods"], abs=1e-4)
        assert same["metrics"]["acc"] == row["acc"]
        if row["strength"]:
            assert same["resps"] != theirs[0.0, order[row["name"]]]["resps"]


def test_filters_perplexity_limit_and_plain_text(folder, pack, tmp_path):
    result = run(
        folder,
        tmp_path,
        ["tiny_rolling", "tiny_written"],
        pack=pack,
        limit=5,
        plain_text=["w1 w2 w3 w4"],
    )
    assert list(result.tasks) == ["tiny_rolling", "tiny_written"]
    written = result.tasks["tiny_written"].measurements[2.0]
    assert set(written) == {"exact_match,first", "exact_match,word"}
    assert result.tasks["tiny_written"].n_questions == 5
    rows = [r for r in lines(tmp_path / "rows.jsonl") if r["task"] == "tiny_rolling"]
    for strength in (0.0, 2.0):
        parts = [r["metrics"]["word_perplexity"] for r in rows if r["strength"] == strength]
        expected = np.exp(-sum(value for value, _ in parts) / sum(n for _, n in parts))
        measured = result.tasks["tiny_rolling"].measurements[strength]["word_perplexity"]
        assert measured.mean == pytest.approx(expected)
        assert measured.interval[0] < measured.mean < measured.interval[1]
    assert measured.change_interval[0] <= measured.change <= measured.change_interval[1]
    assert result.divergence[2.0] > 0
    assert result.n_plain_texts == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tasks"]["tiny_written"]["n_questions"] == 5


def test_a_group_has_the_harness_s_mean_over_its_tasks(folder, pack, tmp_path, few_tasks):
    result = run(folder, tmp_path, ["tiny_group", "tiny_choice"], pack=pack)
    assert list(result.tasks) == ["tiny_choice", "tiny_long", "tiny_group"]
    for strength in (0.0, 2.0):
        metrics = [
            r["metrics"] for r in lines(tmp_path / "rows.jsonl") if r["strength"] == strength
        ]
        assert len(metrics) == N_ITEMS + 5
        measured = result.tasks["tiny_group"].measurements[strength]
        assert set(measured) == {"acc"}
        assert measured["acc"].mean == pytest.approx(np.mean([m["acc"] for m in metrics]))
        low, high = measured["acc"].interval
        assert low < measured["acc"].mean < high
    assert result.tasks["tiny_group"].n_questions == N_ITEMS + 5


def test_items_that_lose_their_beginning_are_counted(folder, tmp_path):
    result = run(folder, tmp_path, ["tiny_long"])
    assert (result.tasks["tiny_long"].n_questions, result.tasks["tiny_long"].n_cut) == (5, 2)
    cut = {row["name"]: row["is_cut"] for row in lines(tmp_path / "rows.jsonl")}
    assert cut == {"0": True, "1": True, "2": False, "3": False, "4": False}


def test_a_killed_run_goes_on_with_the_tasks_that_are_left(folder, pack, tmp_path, monkeypatch):
    from expertsteer.evaluation import harness_run

    asks = {"tasks": ["tiny_choice", "tiny_written"], "pack": pack}
    whole = run(folder, tmp_path / "whole", **asks)
    ran = []
    original = harness_run._run

    def killed(model, task, *arguments, **options):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(task.task_name)
        return original(model, task, *arguments, **options)

    monkeypatch.setattr(harness_run, "_run", killed)
    output = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(folder, output, **asks)
    # As if the kill had come while a third task's rows were written.
    third = [row | {"strength": 2.0} for row in lines(output / "rows.jsonl")[:4]]
    with (output / "rows.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in third) + '{"strength": 2.0, "ta')
    assert not (output / "summary.json").exists()
    ran = [None] * 3  # counts on from there, and never reaches the kill
    again = run(folder, output, **asks)
    assert ran[3:] == ["tiny_choice", "tiny_written"]
    assert again.tasks == whole.tasks
    for name in ("rows.jsonl", "tasks.jsonl"):
        assert (output / name).read_text() == (tmp_path / "whole" / name).read_text()
    ran = [None] * 3
    assert run(folder, output, **asks).tasks == whole.tasks
    assert ran == [None] * 3
    with pytest.raises(DataError, match=r"another run \(task differ"):
        run(folder, output, **asks, limit=3)


def test_chat_template_and_solved_examples_are_passed_on(folder, tmp_path, monkeypatch):
    import lm_eval

    seen = []
    original = lm_eval.simple_evaluate

    def watching(*arguments, **options):
        seen.append(original(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(lm_eval, "simple_evaluate", watching)
    model = tiny_language_model("llama", chat=True)
    evaluate_harness_tasks(
        model,
        ["tiny_written"],
        tmp_path,
        include_path=folder,
        chat_template=True,
        n_shots=2,
        limit=2,
    )
    (results,) = seen
    prompt = results["samples"]["tiny_written"][0]["arguments"][0][0]
    assert prompt.count("<user>") == 3
    assert prompt.count("<assistant>") == 3
    assert lines(tmp_path / "tasks.jsonl")[0]["n_shots"] == 2
    with pytest.raises(ModelError, match="chat template"):
        run(folder, tmp_path / "base", ["tiny_choice"], chat_template=True)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("tiny_choise", ParameterError, r"'tiny_choise'.* Closest: tiny_choice"),
        ("tiny_missing", DataError, r"Cannot load the task 'tiny_missing': .*nowhere\.json"),
        ("tiny_coded", ParameterError, "runs code"),
    ],
)
def test_a_task_that_cannot_be_run_is_named(folder, tmp_path, few_tasks, task, error, message):
    with pytest.raises(error, match=message):
        run(folder, tmp_path, [task])
    assert not (tmp_path / "run.json").exists()


def test_a_refusal_of_the_harness_is_a_message(folder, tmp_path):
    with pytest.raises(DataError, match=r"Cannot run the task 'tiny_choice': .*"):
        run(folder, tmp_path, ["tiny_choice"], n_shots=50)
    with pytest.raises(ParameterError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path, ["tiny_choice"])


def test_without_the_harness_the_extra_is_named(folder, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(DataError, match=r"'tiny_choice'.*expertsteer\[eval\]"):
        run(folder, tmp_path, ["tiny_choice"])
