"""Questions scored, kept row by row, and continued."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from expertsteer import SteeringPack
from expertsteer.data import RenderedText, load_examples
from expertsteer.errors import DataError
from expertsteer.evaluation.intervals import (
    mean_interval,
    statistic_interval,
    strata_interval,
)
from expertsteer.evaluation.multiple_choice import (
    ChoiceTask,
    Question,
    questions_of,
    score_questions,
)
from expertsteer.evaluation.row_file import RowFile
from expertsteer.evaluation.run import evaluate
from expertsteer.evaluation.scoring import (
    Request,
    continuation_log_likelihoods,
    encode_request,
    token_divergences,
)
from helpers import CONTEXT, FAMILIES, tiny_language_model

REQUESTS = [
    Request((1, 5, 6, 7), ((8, 9), (10,), (11, 12, 13))),
    Request((1, 5, 6, 7, 20, 21, 22), ((8, 9, 4), (10, 11))),
    Request((3,), ((9,),)),
]
PLAIN = ["w1 w2 w3 w4", "w9 w8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {
            "question": f"w{n} w{n + 1} w{n + 2}",
            "choices": [f"w{3 * n}", f"w{n + 7} w{n + 8}", f"w{n + 9} w1 w2"],
            "answer": n % 3,
            "split": "test" if n < 12 else "train",
        }
        for n in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(path)


@pytest.fixture(scope="module")
def task(data):
    return ChoiceTask(tuple(questions_of(data, tiny_language_model("llama"))))


@pytest.fixture(scope="module")
def pack():
    model = tiny_language_model("llama")
    vector = torch.randn(model.description.width, generator=torch.Generator().manual_seed(0))
    return SteeringPack(
        vectors={1: vector / vector.norm()},
        mean_residual_norms={1: 5.0},
        target=model.description,
        expert=None,
        pairs=(),
        strength=0.5,
        encoders={},
        provenance={},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_from_a_shared_context_score_as_whole_sequences(family):
    model = tiny_language_model(family)
    found = continuation_log_likelihoods(model, REQUESTS, progress=False)
    for (context, continuations), scores in zip(REQUESTS, found, strict=True):
        for tokens, score in zip(continuations, scores, strict=True):
            with torch.inference_mode():
                logits = model.model(torch.tensor([[*context, *tokens]])).logits[0]
            rows = logits.log_softmax(-1)[len(context) - 1 : -1]
            expected = float(rows.gather(1, torch.tensor(tokens)[:, None]).sum())
            assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
            assert score.is_greedy == (rows.argmax(-1).tolist() == list(tokens))


def test_batches_do_not_change_scores_and_report_each_request_once():
    model, seen = tiny_language_model("gemma3_text"), []
    found = [
        continuation_log_likelihoods(
            model,
            REQUESTS,
            batch_tokens=size,
            on_batch=lambda places, _: seen.extend(places),
            progress=False,
        )
        for size in (1, 1000)
    ]
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    flat = [[s.log_likelihood for scores in run for s in scores] for run in found]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5)


def test_answers_are_the_tokens_beyond_the_prompt_and_long_prompts_are_cut():
    model = tiny_language_model("llama")
    request, is_cut = encode_request(model, "w1 w2 ", ["w3", "w4 w5"])
    whole = [model.tokenizer(f"w1 w2 {answer}")["input_ids"] for answer in ("w3", "w4 w5")]
    assert not is_cut
    for tokens, expected in zip(request.continuations, whole, strict=True):
        assert [*request.context, *tokens] == expected
    request, is_cut = encode_request(model, "w1 " * (CONTEXT + 5), ["w3 w4"])
    assert is_cut
    assert len(request.context) + len(request.continuations[0]) - 1 == CONTEXT
    with pytest.raises(DataError, match="without a token"):
        encode_request(model, "w1", [""])


def test_questions_are_groups_with_one_right_answer(data):
    model = tiny_language_model("llama")
    questions = questions_of(data, model)
    assert len(questions) == 12
    assert questions[1].answers[questions[1].right].strip() == "w8 w9"
    few = questions_of(data, model, limit=5, seed=1)
    assert len(few) == 5
    assert few == questions_of(data, model, limit=5, seed=1)
    assert {q.name for q in few} <= {q.name for q in questions}
    with pytest.raises(DataError, match="validation"):
        questions_of(data, model, split="validation")


def test_rows_follow_from_their_log_likelihoods(data):
    model = tiny_language_model("llama")
    questions = questions_of(data, model)
    rows = {r["name"]: r for r in score_questions(model, questions, letters=True, progress=False)}
    assert len(rows) == 12
    for question in questions:
        row = rows[question.name]
        scores = np.array(row["log_likelihoods"])
        assert row["characters"] == [len(answer.strip()) for answer in question.answers]
        assert row["acc"] == (scores.argmax() == question.right)
        assert row["acc_norm"] == ((scores / row["characters"]).argmax() == question.right)
        assert row["acc_letter"] == (np.argmax(row["letter_log_likelihoods"]) == question.right)
        expected = np.exp(scores[question.right]) / np.exp(scores).sum()
        assert row["probability"] == pytest.approx(expected, rel=1e-6)
        assert row["log_odds"] == pytest.approx(np.log(expected / (1 - expected)), rel=1e-6)
        assert row["is_cut"] is False


def test_questions_and_texts_that_do_not_fit_are_counted(tmp_path):
    model = tiny_language_model("llama")
    answers = (" w1", " w2 w3")
    questions = (
        Question("long", "w5 " * (CONTEXT + 1), answers, 0, False),
        Question("short", "w5 w6", answers, 1, False),
        # Fits alone, but not with the answers listed in the prompt.
        Question("with letters", "w5 " * (CONTEXT - 5), answers, 1, False),
    )
    plain = ["w1 w2", "w3 " * (CONTEXT + 9)]
    with pytest.warns(UserWarning, match="3 of 6 prompts") as caught:
        result = evaluate(
            model, ChoiceTask(questions, True), tmp_path, plain_text=plain, progress=False
        )
    assert any("1 of 2 texts" in str(warning.message) for warning in caught)
    assert (result.n_questions, result.n_cut) == (3, 2)
    assert (result.n_plain_texts, result.n_plain_cut) == (2, 1)
    for name, key, expected in (
        ("rows", "name", {"long": True, "short": False, "with letters": True}),
        ("plain", "text", {0: False, 1: True}),
    ):
        rows = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        assert {row[key]: row["is_cut"] for row in rows} == expected
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["n_cut"], summary["n_plain_cut"]) == (2, 1)


def test_an_evaluation_can_be_recomputed_from_its_rows(task, pack, tmp_path):
    model = tiny_language_model("llama")
    result = evaluate(
        model, task, tmp_path, pack=pack, strengths=[1.0], plain_text=PLAIN, progress=False
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    for strength in (0.0, 1.0):
        mean = np.mean([row["probability"] for row in rows if row["strength"] == strength])
        assert result.measurements[strength]["probability"].mean == pytest.approx(mean)
    change = result.measurements[1.0]["probability"]
    assert change.change != 0
    assert change.change_interval[0] <= change.change <= change.change_interval[1]
    assert result.measurements[0.0]["acc"].change == 0
    assert result.divergence[0.0] == 0
    assert result.divergence[1.0] > 0
    assert result.perplexity[1.0] != result.perplexity[0.0]
    assert json.loads((tmp_path / "summary.json").read_text())["n_questions"] == 12


def test_a_killed_evaluation_goes_on_where_it_was(task, pack, tmp_path, monkeypatch):
    model = tiny_language_model("llama")
    settings = {"pack": pack, "strengths": [1.0], "plain_text": PLAIN, "progress": False}
    whole = evaluate(model, task, tmp_path / "whole", **settings)
    evaluate(model, task, tmp_path / "cut", **settings)
    rows = tmp_path / "cut" / "rows.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:15]) + lines[15][:20])
    asked = []
    score_batch = ChoiceTask.score_batch

    def counting(task, model, batch):
        asked.append(len(batch.questions))
        return score_batch(task, model, batch)

    monkeypatch.setattr(ChoiceTask, "score_batch", counting)
    again = evaluate(model, task, tmp_path / "cut", **settings)
    assert sum(asked) == 12  # the one batch that was not whole
    assert rows.read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
    assert again.perplexity == whole.perplexity
    assert again.measurements[1.0]["acc"] == whole.measurements[1.0]["acc"]
    names = [(r["strength"], r["name"]) for r in map(json.loads, rows.read_text().splitlines())]
    assert len(names) == len(set(names)) == 24


def test_strengths_share_the_blocks_below_the_steered_one(task, pack, tmp_path):
    model = tiny_language_model("llama")
    ran = [0, 0, 0]

    def count(place, *_):
        ran[place] += 1

    parts = [next(m for m in block.modules() if m is not block) for block in model.blocks]
    handles = [
        part.register_forward_pre_hook(partial(count, place)) for place, part in enumerate(parts)
    ]
    evaluate(model, task, tmp_path / "alone", plain_text=PLAIN, progress=False)
    alone = tuple(ran)
    strengths = (0.1, 0.5)
    evaluate(
        model,
        task,
        tmp_path / "all",
        pack=pack,
        strengths=strengths,
        plain_text=PLAIN,
        progress=False,
    )
    for handle in handles:
        handle.remove()
    below = [after - before for before, after in zip(alone, ran, strict=True)]
    assert below[:2] == [alone[0]] * 2
    assert below[2] >= 3 * alone[2]


def test_another_run_in_the_same_folder_is_refused(task, tmp_path):
    model = tiny_language_model("llama")
    evaluate(model, task, tmp_path, progress=False)
    with pytest.raises(DataError, match=r"another run .*task"):
        evaluate(model, replace(task, letters=True), tmp_path, progress=False)


def test_damage_is_the_divergence_of_the_next_token_distributions(pack):
    model = tiny_language_model("llama")
    texts = [RenderedText(text, 0, False) for text in PLAIN]
    steering = pack.apply(model, 1.0)
    for text, damage in zip(PLAIN, token_divergences(model, texts, steering), strict=True):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            plain = model.model(ids).logits[0, :-1].log_softmax(-1)
            with steering:
                steered = model.model(ids).logits[0, :-1].log_softmax(-1)
        expected = torch.nn.functional.kl_div(steered, plain, log_target=True, reduction="none")
        torch.testing.assert_close(damage.divergence, expected.sum(-1), atol=1e-5, rtol=1e-4)
        chosen = steered.gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(damage.steered_log_likelihood, chosen, atol=1e-5, rtol=1e-4)


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        RowFile(tmp_path / "rows.jsonl")


def test_intervals_of_statistics_and_strata_are_those_of_means():
    values = np.random.default_rng(1).normal(3, 1, 400)
    low, high = mean_interval(values)
    of_statistic = statistic_interval(lambda rows: float(values[rows].mean()), len(values))
    assert of_statistic == pytest.approx((low, high), abs=0.02)
    # Strata of one mean each: weighted by size, the same mean but for a narrower interval.
    strata = [values[:100], values[100:]]
    assert strata_interval(strata, [100, 300]) == pytest.approx((low, high), abs=0.02)
    apart = [values[:200], values[200:] + 100]
    found = strata_interval(apart, [1, 1])
    assert found[1] - found[0] == pytest.approx(high - low, rel=0.1)
    assert found[0] < (apart[0].mean() + apart[1].mean()) / 2 < found[1]
    nothing = statistic_interval(lambda rows: float("nan"), 3)
    assert np.isnan(nothing).all()


def test_strata_with_the_same_items_are_drawn_together():
    values = np.random.default_rng(1).normal(3, 1, 400)
    low, high = mean_interval(values)
    names = [f"prompt {n}" for n in range(400)]
    together = strata_interval([values, values], [1, 1], [names, names])
    assert together == pytest.approx((low, high), abs=0.02)
    apart = strata_interval([values, values], [1, 1])
    assert apart[1] - apart[0] == pytest.approx((high - low) / np.sqrt(2), rel=0.1)
    # What one item adds here it takes there.
    opposed = strata_interval([values, -values], [1, 1], [names, names])
    assert opposed == pytest.approx((0, 0), abs=1e-9)
    # Half of the items are shared: between the two.
    other = names[:200] + [f"question {n}" for n in range(200)]
    some = strata_interval([values, values], [1, 1], [names, other])
    assert apart[1] - apart[0] < some[1] - some[0] < together[1] - together[0]


def test_intervals_hold_the_mean_and_shrink_with_more_items():
    rng = np.random.default_rng(0)
    few, many = (mean_interval(rng.normal(1, 1, size)) for size in (20, 2000))
    assert few[1] - few[0] > 5 * (many[1] - many[0])
    assert many[0] < 1 < many[1]
    assert mean_interval(np.ones(5)) == (1.0, 1.0)
