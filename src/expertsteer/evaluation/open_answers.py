"""Open answers by greedy generation, matched as numbers or as text."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from expertsteer.data.answers import ANSWER_SIGN, question_prompt, same_answer
from expertsteer.data.examples import fingerprint_of
from expertsteer.data.formats import group_of, load_rows
from expertsteer.data.splits import Row, complete_splits
from expertsteer.errors import DataError, ParameterError
from expertsteer.evaluation.questions import QuestionBatch, draw_questions, in_batches
from expertsteer.evaluation.scoring import warn_of_cut_prompts
from expertsteer.generation import continue_prompts
from expertsteer.models import LanguageModel

__all__ = [
    "OpenQuestion",
    "answer_questions",
    "extract_answer",
    "load_open_questions",
    "open_questions_of",
]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
# What a base model writes when it goes on to a question of its own.
_NEXT_QUESTION = "\nQuestion:"


@dataclass(frozen=True)
class OpenQuestion:
    """A question that is answered in words.

    Attributes
    ----------
    name : str
    prompt : str
        Examples with their answers, if any, then the question.
    answer : str
        The right one.
    has_special_tokens : bool
        Whether a chat template has put them into the prompt.
    """

    name: str
    prompt: str
    answer: str
    has_special_tokens: bool = False


def load_open_questions(
    source: str | Path,
    *,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    n_shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> list[OpenQuestion]:
    """Load questions with answers of free form.

    Parameters
    ----------
    source : str or Path
        As in `load_examples`. Columns: ``question``, ``answer``; ``rationale`` (the way to
        the answer), ``id``, ``split`` and ``group`` are optional.
    split : {"test", "validation", "train"}, default="test"
    columns, roles, folder
        As in `load_examples`.
    n_shots : int, default=0
        Solved questions of the train split before every question, drawn at random.
    limit : int, optional
        Most questions, drawn at random.
    seed : int, default=0
        Of the draws, and of the split as in `load_examples` where the file has none.

    Returns
    -------
    list of OpenQuestion

    Raises
    ------
    DataError
        On missing columns, an empty split or too few solved questions.
    """
    rows = load_rows(source, columns=columns, roles=roles, folder=folder)
    return open_questions_of(
        rows, str(source), split=split, n_shots=n_shots, limit=limit, seed=seed
    )


def open_questions_of(
    rows: list[Row],
    source: str,
    *,
    split: str = "test",
    n_shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> list[OpenQuestion]:
    """Return the questions of a split of rows from `load_rows`.

    See `load_open_questions`.
    """
    found: list[tuple[str, str, str, str]] = []
    for number, (place, row) in enumerate(rows):
        values = [row.get(name) for name in ("question", "answer", "rationale")]
        question, answer, rationale = ("" if v is None else str(v).strip() for v in values)
        if not question or not answer:
            raise DataError(f"{place}: got no question or no answer, but expected both.")
        name = row.get("id")
        name = f"row {number}" if name is None or name == "" else str(name)
        found.append((name, question, answer, rationale))
    repeated = [name for name, n in Counter(name for name, *_ in found).items() if n > 1]
    if repeated:
        raise DataError(
            f"Got {source} with the id {repeated[0]!r} in several rows, but expected each once. "
            "Change the ids, or leave the column out."
        )
    groups = [group_of(row, number) for number, (_, row) in enumerate(rows)]
    given = [row.get("split") or "" for _, row in rows]
    splits = complete_splits(given, groups, np.ones(len(rows), dtype=np.int8), source, seed=seed)
    by_split: dict[str, list[tuple[str, str, str, str]]] = {}
    for each, name in zip(found, splits, strict=True):
        by_split.setdefault(name, []).append(each)
    asked, solved = by_split.get(split, []), by_split.get("train", [])
    if not asked:
        raise DataError(
            f"Got no rows in the split {split!r} of {source}, which holds "
            f"{', '.join(sorted(by_split))}. Name one of those."
        )
    if n_shots and split == "train":
        raise ParameterError(
            f"Got n_shots={n_shots} for the train split, but solved questions come from there."
        )
    if n_shots > len(solved):
        raise DataError(
            f"Got {len(solved)} solved questions in the train split of {source}, but expected at "
            f"least n_shots={n_shots}."
        )
    rng = random.Random(seed)
    asked = draw_questions(asked, limit, rng)
    shots = "".join(
        f"{question_prompt(question)} {f'{rationale} ' if rationale else ''}"
        f"{ANSWER_SIGN} {answer}.\n\n"
        for _, question, answer, rationale in rng.sample(solved, n_shots)
    )
    return [
        OpenQuestion(name, f"{shots}{question_prompt(question)}", answer)
        for name, question, answer, _ in asked
    ]


@dataclass(frozen=True)
class OpenTask:
    """Questions to answer in words, for `evaluate`.

    Attributes
    ----------
    questions : tuple of OpenQuestion
    max_new_tokens, batch_size : int
        As in `answer_questions`.
    source : dict
        Where the questions come from, for provenance.
    """

    questions: tuple[OpenQuestion, ...]
    max_new_tokens: int = 256
    batch_size: int = 8
    source: dict[str, Any] = field(default_factory=dict)
    metrics: ClassVar[tuple[str, ...]] = ("exact_match",)

    def summary(self) -> dict[str, Any]:
        """Return what decides the rows, as plain JSON types."""
        return {
            "kind": "open answers",
            "fingerprint": fingerprint_of((q.prompt, q.answer) for q in self.questions),
            "max_new_tokens": self.max_new_tokens,
        } | self.source

    def batches(self, model: LanguageModel) -> list[QuestionBatch[OpenQuestion]]:
        """Return all questions in batches; warn of prompts that are too long."""
        encoded, cut = _encoded(model, self.questions, self.max_new_tokens)
        warn_of_cut_prompts(model, sum(cut), len(cut))
        return in_batches(self.questions, list(map(len, encoded)), self.batch_size)

    def score_batch(
        self, model: LanguageModel, batch: QuestionBatch[OpenQuestion]
    ) -> list[dict[str, Any]]:
        """Answer the questions of a batch; see `answer_questions`."""
        encoded, cut = _encoded(model, batch.questions, self.max_new_tokens)
        return _answer(model, batch.questions, encoded, cut, self.max_new_tokens)

    def score(
        self,
        model: LanguageModel,
        questions: Sequence[OpenQuestion],
        on_rows: Callable[[list[dict[str, Any]]], None],
        progress: bool,
    ) -> None:
        """Answer some of the questions; see `answer_questions`."""
        answer_questions(
            model,
            questions,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            on_rows=on_rows,
            progress=progress,
        )


def answer_questions(
    model: LanguageModel,
    questions: Sequence[OpenQuestion],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Let a model answer, greedily, and compare with the right answers.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    questions : sequence of OpenQuestion
    max_new_tokens : int, default=256
    batch_size : int, default=8
        Questions at once, those of similar length together.
    on_rows : callable, optional
        Called with the rows of each batch as soon as it is finished.
    progress : bool, default=True

    Returns
    -------
    list of dict
        A row a question: ``name``, ``answer``, ``generated``, ``extracted``,
        ``exact_match``, 0 or 1, ``is_cut``, whether the prompt lost its beginning, and
        ``is_unfinished``, whether the answer reached ``max_new_tokens`` before an end.

    Notes
    -----
    A prompt that does not fit the context with its answer loses its beginning; a warning
    says how many do.
    """
    encoded, cut = _encoded(model, questions, max_new_tokens)
    warn_of_cut_prompts(model, sum(cut), len(questions))
    rows: list[dict[str, Any]] = []
    batches = in_batches(range(len(questions)), list(map(len, encoded)), batch_size)
    with tqdm(total=len(questions), desc="answering", delay=1, disable=not progress) as bar:
        for batch in batches:
            places = batch.questions
            new = _answer(
                model,
                [questions[n] for n in places],
                [encoded[n] for n in places],
                [cut[n] for n in places],
                max_new_tokens,
            )
            rows += new
            if on_rows is not None:
                on_rows(new)
            bar.update(len(places))
    return rows


def _encoded(
    model: LanguageModel, questions: Sequence[OpenQuestion], max_new_tokens: int
) -> tuple[list[list[int]], list[bool]]:
    """Return the tokens of prompts, and which of them lose their beginning."""
    room = model.context_length - max_new_tokens
    if room < 1:
        raise ParameterError(
            f"Got max_new_tokens={max_new_tokens}, but the context of {model.name} holds "
            f"{model.context_length}. Ask for fewer."
        )
    encoded = [
        model.tokenizer(q.prompt, add_special_tokens=not q.has_special_tokens, verbose=False)[
            "input_ids"
        ]
        for q in questions
    ]
    return [ids[-room:] for ids in encoded], [len(ids) > room for ids in encoded]


def _answer(
    model: LanguageModel,
    questions: Sequence[OpenQuestion],
    encoded: Sequence[Sequence[int]],
    is_cut: Sequence[bool],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    texts, is_finished = _generate(model, encoded, max_new_tokens)
    return [
        _row(question, text) | {"is_cut": cut, "is_unfinished": not finished}
        for question, text, cut, finished in zip(questions, texts, is_cut, is_finished, strict=True)
    ]


def _generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[list[str], list[bool]]:
    """Return the answers, and whether each came to an end."""
    ends = _Ends(model, max(map(len, prompts)), len(prompts))
    texts = continue_prompts(
        model,
        prompts,
        max_new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([ends]),
    )
    return [text.partition(_NEXT_QUESTION)[0] for text in texts], ends.reached


class _Ends(StoppingCriteria):
    """Ends an answer where the model goes on to a question of its own; knows what has ended."""

    def __init__(self, model: LanguageModel, n_prompt: int, n_answers: int) -> None:
        self.tokenizer = model.tokenizer
        self.n_prompt = n_prompt
        self.end_token_ids = model.end_token_ids
        self.reached = [False] * n_answers

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any
    ) -> torch.BoolTensor:
        # A token is at least one byte, so the string lies within as many of the newest.
        newest = max(self.n_prompt, input_ids.shape[1] - len(_NEXT_QUESTION))
        texts = self.tokenizer.batch_decode(input_ids[:, newest:])
        ended = [_NEXT_QUESTION in text for text in texts]
        last = input_ids[:, -1].tolist()
        self.reached = [
            before or found or token in self.end_token_ids
            for before, found, token in zip(self.reached, ended, last, strict=True)
        ]
        return cast(torch.BoolTensor, torch.tensor(ended, device=input_ids.device))


def _row(question: OpenQuestion, generated: str) -> dict[str, Any]:
    extracted = extract_answer(generated)
    return {
        "name": question.name,
        "answer": question.answer,
        "generated": generated,
        "extracted": extracted,
        "exact_match": int(same_answer(extracted, question.answer)),
    }


def extract_answer(generated: str) -> str:
    """Return the answer in what a model wrote.

    What follows the last "The answer is", "####" or stands in the last box of LaTeX;
    otherwise the last number; otherwise the first line.
    """
    for sign in (r"\boxed{", ANSWER_SIGN, ANSWER_SIGN.lower(), "####"):
        _, found, after = generated.rpartition(sign)
        if not found:
            continue
        if sign.endswith("{"):
            return _to_closing_brace(after)
        return after.strip(" :\n").partition("\n")[0].strip().rstrip(".")
    numbers = _NUMBER.findall(generated)
    return numbers[-1] if numbers else generated.strip().partition("\n")[0].strip()


def _to_closing_brace(text: str) -> str:
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return text
