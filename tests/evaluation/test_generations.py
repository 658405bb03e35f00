"""Prompts continued, judged, kept row by row, continued, and shown blind."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from expertsteer import SteeringPack
from expertsteer.data import EffectWords, load_prompts, shipped_file
from expertsteer.errors import DataError, ModelError, ParameterError
from expertsteer.evaluation import (
    GenerationTask,
    OpenPrompt,
    continuation_perplexities,
    evaluate,
    load_generations,
    repetition,
)
from helpers import CONTEXT, random_vector, tiny_language_model

PROMPTS = [" ".join(f"w{n + k}" for k in range(2 + n % 4)) for n in range(7)]
MODEL = "llama"


class CountJudge:
    """Counts a word: a score whose right value is known."""

    name = "count"

    def score(self, texts):
        return [float(text.count("w")) for text in texts]

    def summary(self):
        return {"name": self.name}

    def require_independent(self, pack):
        pass


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    return file


@pytest.fixture(scope="module")
def pack():
    return SteeringPack(
        vectors={1: random_vector()},
        mean_residual_norms={1: 5.0},
        target=tiny_language_model(MODEL).description,
        expert=None,
        pairs=(),
        strength=0.5,
    )


def sampled(path, **settings):
    settings = {"n_samples": 3, "temperature": 1.0, "max_new_tokens": 6, "batch_size": 4} | settings
    judges = [CountJudge()]
    return load_generations(path, tiny_language_model(MODEL), judges=judges, **settings)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_prompts_are_lines_or_those_of_effect_words(path, tmp_path):
    assert load_prompts(path) == PROMPTS
    words = EffectWords.load(shipped_file("sentiment_effect.json"))
    assert load_prompts(shipped_file("sentiment_effect.json")) == words.generation_prompts
    bare = {"prompts": ["w1"], "positive_words": ["a"], "negative_words": ["b"]}
    (tmp_path / "bare.yaml").write_text(json.dumps(bare | {"plain_sentences": ["c"]}))
    assert load_prompts(tmp_path / "bare.yaml") == ["w1"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="empty"):
        load_prompts(tmp_path / "empty.txt")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_greedy_row_is_what_the_prompt_alone_gives(family, path):
    model, rows = tiny_language_model(family), []
    task = load_generations(path, model, max_new_tokens=5, batch_size=3)
    task.score(model, task.questions, rows.extend, False)
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    for row in rows:
        ids = model.tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        new = tokens[0, ids.shape[1] :]
        assert row["text"] == model.tokenizer.decode(new, skip_special_tokens=True)


def test_perplexity_is_that_of_the_continuation_under_the_third_model():
    model = tiny_language_model("gpt2")
    prompts, texts = ["w1 w2", "w3 w4", "w5"], [" w5 w6 w7", "w9 w8", " "]
    found = continuation_perplexities(model, prompts, texts)
    # A token that lies across the seam counts as the continuation's: "w4w9" is one.
    for place, n_tokens in ((0, 3), (1, 2)):
        ids = model.tokenizer(prompts[place] + texts[place], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            scores = model.model(ids).logits[0].log_softmax(-1)
        last = range(ids.shape[1] - n_tokens, ids.shape[1])
        total = sum(float(scores[n - 1, ids[0, n]]) for n in last)
        assert found[place] == pytest.approx(math.exp(-total / n_tokens), rel=1e-4)
    assert found[2] is None
    with pytest.warns(UserWarning, match="1 of 2 texts do not fit the 64 tokens of tiny"):
        long, _ = continuation_perplexities(model, ["w1"] * 2, [" w2" * (CONTEXT + 9), " w3"])
    assert long is not None
    assert math.isfinite(long)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e f", 0.0),
        ("a b c", 0.0),
        ("", 0.0),
        ("a b c d a b c d", 1 / 5),
        ("so so so so so so so", 3 / 4),
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(text, expected):
    assert repetition(text) == pytest.approx(expected)


def test_samples_are_the_same_after_an_interruption_and_differ_by_sample(path, pack, tmp_path):
    model, task = tiny_language_model(MODEL), sampled(path)
    out = tmp_path / "out"
    result = evaluate(model, task, out, pack=pack, progress=False)
    whole = sorted((out / "rows.jsonl").read_text().splitlines())
    assert len(whole) == 2 * 3 * len(PROMPTS)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    torch.manual_seed(123)
    again = evaluate(model, task, out, pack=pack, progress=False)
    assert sorted((out / "rows.jsonl").read_text().splitlines()) == whole
    assert again.measurements == result.measurements
    texts = {row["text"] for row in rows_of(out) if row["group"] == "prompt 0"}
    assert len(texts) > 2
    with pytest.raises(DataError, match="another run"):
        evaluate(model, sampled(path, temperature=0.5), out, pack=pack, progress=False)


def test_a_prompt_and_not_a_sample_is_an_item(path, pack, tmp_path):
    model, task = tiny_language_model(MODEL), sampled(path)
    out = tmp_path / "out"
    result = evaluate(model, task, out, pack=pack, progress=False)
    assert result.n_questions == len(PROMPTS)
    rows = rows_of(out)
    for strength, measured in result.measurements.items():
        counts = [row["count"] for row in rows if row["strength"] == strength]
        assert measured["count"].mean == pytest.approx(sum(counts) / len(counts))
        assert set(measured) == {"count", "rep_4", "n_words"}


def test_the_same_seed_draws_unsteered_and_steered(path, pack, tmp_path):
    # A strength next to nothing changes no draw, where another seed changes nearly all.
    model = tiny_language_model(MODEL)
    evaluate(model, sampled(path), tmp_path / "a", pack=pack, strengths=[1e-6], progress=False)
    found: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "a"):
        found.setdefault(row["name"], set()).add(row["text"])
    assert all(len(texts) == 1 for texts in found.values())
    other = sampled(path, seed=7)
    evaluate(model, other, tmp_path / "b", progress=False)
    changed = sum(row["text"] not in found[row["name"]] for row in rows_of(tmp_path / "b"))
    assert changed > len(found) / 2


def test_a_metric_that_some_rows_lack_is_paired_on_the_others(path, pack, tmp_path, monkeypatch):
    model, third = tiny_language_model(MODEL), tiny_language_model("gpt2")
    task = load_generations(path, model, fluency=third, max_new_tokens=4)
    out = tmp_path / "out"
    evaluate(model, task, out, pack=pack, progress=False)
    rows = rows_of(out)
    for row in rows:
        if row["strength"] and row["name"].startswith("prompt 0"):
            row["perplexity"] = None
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = evaluate(model, task, out, pack=pack, progress=False).measurements[0.5]
    kept = {
        strength: {
            row["name"]: row["perplexity"]
            for row in rows
            if row["strength"] == strength and not row["name"].startswith("prompt 0")
        }
        for strength in (0.0, 0.5)
    }
    changes = [kept[0.5][name] - kept[0.0][name] for name in kept[0.0]]
    assert measured["perplexity"].change == pytest.approx(sum(changes) / len(changes))
    for row in rows:
        row["perplexity"] = None
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "perplexity" not in evaluate(model, task, out, progress=False, pack=pack).measurements[0]


def test_the_blind_sample_holds_every_text_and_its_key_tells_which(path, pack, tmp_path):
    model, task = tiny_language_model(MODEL), sampled(path, n_blind=5)
    out = tmp_path / "out"
    evaluate(model, task, out, pack=pack, strengths=[0.4, 0.8], progress=False)
    page, key = (out / "blind.md").read_text(), json.loads((out / "blind_key.json").read_text())
    texts = {(row["name"], row["strength"]): row for row in rows_of(out)}
    sections = re.split(r"^## \d+$", page, flags=re.M)[1:]
    assert len(sections) == len(key) == len({entry["name"] for entry in key}) == 5
    for section, entry in zip(sections, key, strict=True):
        blocks = re.findall(r"^~~~text\n(.*?)\n?~~~$", section, flags=re.M | re.S)
        letters = re.findall(r"^\*\*(.+)\*\*$", section, flags=re.M)
        assert letters == list(entry["strengths"]) == ["A", "B", "C"]
        assert sorted(entry["strengths"].values()) == [0.0, 0.4, 0.8]
        for letter, block in zip(letters, blocks[1:], strict=True):
            assert block == texts[entry["name"], entry["strengths"][letter]]["text"]
    assert len({tuple(entry["strengths"].values()) for entry in key}) > 1
    assert not re.search(r"0\.[48]|strength", page)
    evaluate(model, task, tmp_path / "plain", progress=False)
    assert not (tmp_path / "plain" / "blind.md").exists()


def test_a_text_cannot_close_its_fence(pack, tmp_path):
    question = OpenPrompt("p, sample 0", "p", "w1 ~~~", "w1")
    rows = [{"name": question.name, "strength": s, "text": "w2\n~~~~\nw3"} for s in (0.0, 1.0)]
    GenerationTask((question,)).write_blind_sample(rows, tmp_path)
    page = (tmp_path / "blind.md").read_text()
    assert page.count("~~~~~text\nw2\n~~~~\nw3\n~~~~~\n") == 2


def test_what_cannot_be_measured_is_refused_before_the_folder_is_claimed(path, pack, tmp_path):
    model = tiny_language_model(MODEL)
    same = load_generations(path, model, fluency=replace(model, name="copy"))
    with pytest.raises(ModelError, match="'copy', which is the target"):
        evaluate(model, same, tmp_path / "out", pack=pack, progress=False)
    long = load_generations(path, model, max_new_tokens=CONTEXT)
    with pytest.raises(DataError, match=f"holds {CONTEXT}"):
        evaluate(model, long, tmp_path / "out", pack=pack, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": 2}, "temperature=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"judges": [CountJudge(), CountJudge()]}, "each once"),
        ({"judges": ["mood"]}, "'mood'"),
    ],
)
def test_settings_out_of_range_are_refused(path, settings, message):
    with pytest.raises(ParameterError, match=message):
        load_generations(path, tiny_language_model(MODEL), **settings)


def test_prompts_are_drawn_by_seed_and_put_into_the_chat_template(path):
    model = tiny_language_model(MODEL, chat=True)
    task = load_generations(path, model, chat_template=True, limit=3, seed=1)
    assert len(task.questions) == 3
    assert all(q.text.endswith("<assistant>") and q.prompt in q.text for q in task.questions)
    assert task == load_generations(path, model, chat_template=True, limit=3, seed=1)
    with pytest.raises(ModelError, match="chat template"):
        load_generations(path, tiny_language_model(MODEL), chat_template=True)
