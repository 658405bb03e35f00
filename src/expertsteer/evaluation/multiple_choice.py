"""Multiple choice by log-likelihood: which answer does a model find likeliest."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertsteer.data import LabelledExamples, render
from expertsteer.data.examples import fingerprint_of
from expertsteer.errors import DataError
from expertsteer.evaluation.questions import QuestionBatch, draw_questions
from expertsteer.evaluation.scoring import (
    Request,
    continuation_log_likelihoods,
    encode_request,
    request_sizes,
    warn_of_cut_prompts,
)
from expertsteer.models import LanguageModel
from expertsteer.models.batches import token_batches

__all__ = ["ChoiceTask", "Question", "is_questions", "questions_of", "score_questions"]


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes
    ----------
    name : str
        Of the group in the data.
    prompt : str
        What comes before an answer.
    answers : tuple of str
        With the space before them.
    right : int
        Index of the right answer.
    has_special_tokens : bool
        Whether a chat template has put them into the prompt.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    right: int
    has_special_tokens: bool


def is_questions(examples: LabelledExamples) -> bool:
    """Return whether rows are the answers to shared prompts, exactly one of them right."""
    right: dict[str, int] = {}
    rows: dict[str, int] = {}
    for group, prompt, label in zip(
        examples.groups, examples.prompts, examples.labels, strict=True
    ):
        rows[group] = rows.get(group, 0) + bool(prompt)
        right[group] = right.get(group, 0) + int(label > 0)
    return all(rows[group] > 1 and right[group] == 1 for group in rows)


def questions_of(
    examples: LabelledExamples,
    model: LanguageModel,
    *,
    split: str = "test",
    chat_template: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """Return the questions of a split, as one model reads them.

    Parameters
    ----------
    examples : LabelledExamples
        Multiple choice, or prompts answered by yes or no: rows of a group share a
        prompt, and exactly one of them is labelled +1.
    model : LanguageModel
        Supplies the chat template.
    split : {"test", "validation", "train"}, default="test"
    chat_template : bool, default=False
    limit : int, optional
        Most questions, drawn at random.
    seed : int, default=0
        Of the draw.

    Returns
    -------
    list of Question

    Raises
    ------
    DataError
        If the split is empty or a group is no question.
    """
    chosen = examples.split(split)
    texts = render(chosen, model.tokenizer, chat_template)
    groups: dict[str, list[int]] = {}
    for row, group in enumerate(chosen.groups):
        groups.setdefault(group, []).append(row)
    questions = []
    for name in draw_questions(list(groups), limit, random.Random(seed)):
        rows = groups[name]
        prompts = {texts[row].text[: texts[row].answer_start] for row in rows}
        right = [place for place, row in enumerate(rows) if chosen.labels[row] > 0]
        if len(rows) < 2 or len(right) != 1 or prompts == {""} or len(prompts) > 1:
            raise DataError(
                f"Got {len(rows)} answers, {len(right)} of them right, in {name!r} of "
                f"{chosen.source}, but expected a question with one right answer of two or more. "
                "Evaluate multiple choice or yes/no data."
            )
        answers = tuple(texts[row].text[texts[row].answer_start :] for row in rows)
        special = texts[rows[0]].has_special_tokens
        questions.append(Question(name, prompts.pop(), answers, right[0], special))
    return questions


@dataclass(frozen=True)
class ChoiceTask:
    """Questions whose answers are scored by log-likelihood, for `evaluate`.

    Attributes
    ----------
    questions : tuple of Question
    letters : bool
        As in `score_questions`.
    source : dict
        Where the questions come from, for provenance.
    """

    questions: tuple[Question, ...]
    letters: bool = False
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Fields of a row that are averaged."""
        letters = ("acc_letter",) if self.letters else ()
        return ("acc", "acc_norm", *letters, "probability", "log_odds")

    def summary(self) -> dict[str, Any]:
        """Return what decides the rows, as plain JSON types."""
        rows = ((q.prompt, *q.answers, str(q.right)) for q in self.questions)
        return {
            "kind": "multiple choice",
            "fingerprint": fingerprint_of(rows),
            "letters": self.letters,
        } | self.source

    def batches(self, model: LanguageModel) -> list[QuestionBatch[Question]]:
        """Return all questions in batches; warn of prompts that are too long."""
        requests, cut = _encoded(model, self.questions, self.letters)
        warn_of_cut_prompts(model, sum(cut), len(cut))
        parts = len(requests) // max(len(self.questions), 1)
        lengths, heads = request_sizes(requests)
        # A question is as long as the longer of its two requests.
        longest = [max(lengths[n : n + parts]) for n in range(0, len(lengths), parts)]
        positions = [max(heads[n : n + parts]) for n in range(0, len(heads), parts)]
        found, start = [], 0
        for places in token_batches(longest, head_positions=positions):
            found.append(QuestionBatch(tuple(self.questions[n] for n in places), start))
            start += len(places)
        return found

    def score_batch(
        self, model: LanguageModel, batch: QuestionBatch[Question]
    ) -> list[dict[str, Any]]:
        """Score the questions of a batch; see `score_questions`."""
        encoded = _encoded(model, batch.questions, self.letters)
        return _score(model, batch.questions, *encoded, self.letters)

    def score(
        self,
        model: LanguageModel,
        questions: Sequence[Question],
        on_rows: Callable[[list[dict[str, Any]]], None],
        progress: bool,
    ) -> None:
        """Score some of the questions; see `score_questions`."""
        score_questions(model, questions, letters=self.letters, on_rows=on_rows, progress=progress)


def score_questions(
    model: LanguageModel,
    questions: Sequence[Question],
    *,
    letters: bool = False,
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Score every answer of every question.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    questions : sequence of Question
    letters : bool, default=False
        Also list the answers with letters in the prompt and score the letters.
    on_rows : callable, optional
        Called with the rows of each batch as soon as it is finished.
    progress : bool, default=True

    Returns
    -------
    list of dict
        A row a question, in no particular order: ``name``, ``right``,
        ``log_likelihoods`` (nats) and ``characters`` of the answers, then 0 or 1 for
        ``acc`` (highest log-likelihood), ``acc_norm`` (highest a
        character of the answer, as lm-eval's acc_norm) and, with ``letters``,
        ``acc_letter``; ``probability`` of the right answer among the answers and its
        ``log_odds`` against all others together (nats); ``is_cut``, whether a prompt lost
        its beginning.

    Notes
    -----
    A prompt that does not fit the context with its longest answer loses its beginning;
    a warning says how many do.
    """
    requests, cut = _encoded(model, questions, letters)
    warn_of_cut_prompts(model, sum(cut), len(requests))
    return _score(model, questions, requests, cut, letters, on_rows, progress)


def _encoded(
    model: LanguageModel, questions: Sequence[Question], letters: bool
) -> tuple[list[Request], list[bool]]:
    """Return a request a question, or two with letters, and which lose their beginning."""
    requests: list[Request] = []
    cut: list[bool] = []
    for question in questions:
        wanted = [(question.prompt, question.answers)]
        if letters:
            wanted.append(_lettered(question))
        for prompt, answers in wanted:
            request, is_cut = encode_request(
                model, prompt, answers, has_special_tokens=question.has_special_tokens
            )
            requests.append(request)
            cut.append(is_cut)
    return requests, cut


def _score(
    model: LanguageModel,
    questions: Sequence[Question],
    requests: Sequence[Request],
    cut: Sequence[bool],
    letters: bool,
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    parts = 2 if letters else 1
    found: dict[int, list[float]] = {}
    rows: list[dict[str, Any]] = []

    def keep(places: list[int], scores: list[list[Any]]) -> None:
        new = []
        for place, answers in zip(places, scores, strict=True):
            found[place] = [score.log_likelihood for score in answers]
            first = place - place % parts
            if all(first + part in found for part in range(parts)):
                likelihoods = [found.pop(first + part) for part in range(parts)]
                is_cut = any(cut[first : first + parts])
                new.append(_row(questions[first // parts], is_cut, *likelihoods))
        rows.extend(new)
        if on_rows is not None and new:
            on_rows(new)

    continuation_log_likelihoods(model, requests, on_batch=keep, progress=progress)
    return rows


def _lettered(question: Question) -> tuple[str, tuple[str, ...]]:
    names = string.ascii_uppercase[: len(question.answers)]
    lines = [f"{name}. {text.strip()}" for name, text in zip(names, question.answers, strict=True)]
    stripped = question.prompt.rstrip()
    listed = "\n".join(lines)
    # Between the question and the word that asks for the answer, where there is one.
    head, asks, tail = stripped.rpartition("\nAnswer:")
    prompt = f"{head}\n{listed}{asks}{tail}" if asks else f"{listed}\n{stripped}"
    return prompt, tuple(f" {name}" for name in names)


def _row(
    question: Question,
    is_cut: bool,
    likelihoods: list[float],
    letters: list[float] | None = None,
) -> dict[str, Any]:
    values = np.array(likelihoods)
    # As lm-eval counts: the answer without the space before it.
    characters = [len(answer.strip()) for answer in question.answers]
    shares = np.exp(values - values.max())
    others = np.delete(values, question.right)
    row = {
        "name": question.name,
        "right": question.right,
        "log_likelihoods": likelihoods,
        "characters": characters,
        "acc": int(values.argmax() == question.right),
        "acc_norm": int((values / characters).argmax() == question.right),
        "probability": float(shares[question.right] / shares.sum()),
        "log_odds": float(values[question.right] - np.logaddexp.reduce(others)),
        "is_cut": is_cut,
    }
    if letters is not None:
        row["letter_log_likelihoods"] = letters
        row["acc_letter"] = int(np.argmax(letters) == question.right)
    return row
