"""The study that makes a domain expert: questions in, an ordinary checkpoint out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from expertsteer.cli import show
from expertsteer.evaluation.open_answers import extract_answer
from expertsteer.models import load_model
from helpers import load_script, tiny_model, tiny_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "studies/domain_expert.py"


@pytest.fixture(scope="module")
def study():
    return load_script(SCRIPT)


@pytest.fixture
def run(study, tmp_path, monkeypatch, capsys):
    """Return a function that runs the script in a folder with a model and two data sets."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    choices, answers = [], []
    for n in range(40):
        question = " ".join(f"w{k}" for k in rng.integers(0, 30, size=rng.integers(2, 6)))
        split = ("train", "train", "validation", "test")[n % 4]
        right = int(rng.integers(0, 3))
        wrong = ["w40 w41", "w42", "w43 w44"]
        wrong[right] = "w80 w81"
        row = {"id": f"m{n}", "split": split, "question": question}
        choices.append(row | {"choices": wrong, "answer": right})
        answers.append(row | {"rationale": f"w60 {question}", "answer": f"w{n}"})
    for name, rows in (("choices", choices), ("open", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.progress, "width", 200)

    def runner(*arguments):
        monkeypatch.setattr(sys, "argv", ["domain_expert.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            study.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return stop.value.code or 0, captured.out, captured.err

    return runner


SMALL = ["--base", "base", "-d", "choices.jsonl", "-o", "expert"]
QUICK = ["--n-questions", 12, "--n-validation", 8, "--batch-tokens", 64]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_expert_knows_more_than_its_base(run, method):
    arguments = [*SMALL, *QUICK, "--method", method, "--learning-rate", 0.01, "--epochs", 4]
    code, out, err = run(*arguments, "-d", "open.jsonl")
    assert code == 0, err
    assert "tokens/s" in out
    record = json.loads(Path("expert/domain_expert.json").read_text())
    training = record["training"]
    assert min(training["validation_loss"][1:]) < training["validation_loss"][0]
    assert sum(record["n_questions"].values()) == training["n_texts"] == 12
    assert training["n_validation_texts"] == 8
    assert set(record["n_questions"]) == {"choices", "open"}
    before, after = (record["validation"][when]["choices"] for when in ("before", "after"))
    assert set(record["validation"]["before"]) == {"choices"}  # open ones are not scored
    assert 0 < before["n"] == after["n"] < 8
    assert after["probability"] > before["probability"]

    expert, base = load_model("expert"), load_model("base")
    assert set(expert.model.state_dict()) == set(base.model.state_dict())
    weights = [next(m.model.get_decoder().layers.parameters()) for m in (expert, base)]
    assert not torch.equal(*weights)
    assert expert.tokenizer.chat_template == base.tokenizer.chat_template

    modified = Path("expert/model.safetensors").stat().st_mtime_ns
    code, _, err = run(*arguments, "-d", "open.jsonl")
    assert code == 0
    assert "finished already" in err
    assert Path("expert/model.safetensors").stat().st_mtime_ns == modified
    code, _, err = run(*arguments, "-d", "open.jsonl", "--seed", 1)
    assert code == 1
    assert "seed: 0 instead of 1" in err


def test_open_answers_end_as_the_evaluation_reads_them(run, study):
    examples = study.load_questions("open.jsonl", "<eos>", 0)
    assert len(examples) == 30  # no test row
    assert "test" not in examples.splits
    assert examples.prompts[0].startswith("Question: w")
    assert examples.prompts[0].endswith("\nAnswer:")
    rows = [json.loads(line) for line in Path("open.jsonl").read_text().splitlines()]
    wanted = [row["answer"] for row in rows if row["split"] == "train"]
    kept = [
        a for a, split in zip(examples.answers, examples.splits, strict=True) if split == "train"
    ]
    assert all(answer.startswith("w60 w") and answer.endswith(".<eos>") for answer in kept)
    assert [extract_answer(answer.removesuffix("<eos>")) for answer in kept] == wanted


def test_an_interrupted_run_leaves_nothing(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    code, _, _ = run(*SMALL, *QUICK)
    assert code == 130
    assert not [path.name for path in Path.cwd().iterdir() if "expert" in path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "choices.jsonl"], "Got two data sets 'choices'"),
        (["-d", "none.jsonl"], "there is no such file"),
        (["-o", "choices.jsonl"], "it is a file"),
        (["-o", "base"], "holds something else"),
        (["--learning-rate", "nan"], "learning_rate=nan"),
        (["--learning-rate", "0"], "learning_rate=0.0"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    code, out, err = run(*SMALL, *QUICK, *arguments)
    assert code == 1
    assert out == ""
    assert message in err
    assert not Path("expert").exists()
