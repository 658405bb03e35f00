"""The odds of telling words after neutral prompts, as a task: a row a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from expertsteer.data import EffectWords
from expertsteer.evaluation.effect import word_log_odds
from expertsteer.models import LanguageModel

__all__ = ["NeutralPrompt", "WordTask"]


class NeutralPrompt(NamedTuple):
    """A beginning that ends right before a telling word.

    Attributes
    ----------
    name : str
    prompt : str
    instruction : str
        What stands before it.
    """

    name: str
    prompt: str
    instruction: str = ""


@dataclass(frozen=True)
class WordTask:
    """Prompts after which the log-odds of positive over negative words are measured.

    Attributes
    ----------
    questions : tuple of NeutralPrompt
    words : EffectWords
        Its prompts are not read.
    source : dict
        Where the words come from, for provenance.
    """

    questions: tuple[NeutralPrompt, ...]
    words: EffectWords
    source: dict[str, Any] = field(default_factory=dict)
    metrics: ClassVar[tuple[str, ...]] = ("log_odds",)

    @classmethod
    def from_words(cls, words: EffectWords) -> WordTask:
        """Return the task of all prompts of an effect file."""
        questions = (NeutralPrompt(f"prompt {n}", text) for n, text in enumerate(words.prompts))
        return cls(tuple(questions), words)

    def summary(self) -> dict[str, Any]:
        """Return what decides the rows, as plain JSON types."""
        return {"kind": "words"} | self.source

    def score(
        self,
        model: LanguageModel,
        questions: Sequence[NeutralPrompt],
        on_rows: Callable[[list[dict[str, Any]]], None],
        progress: bool,
    ) -> None:
        """Measure some of the prompts."""
        prompts = [
            f"{question.instruction}\n\n{question.prompt}"
            if question.instruction
            else question.prompt
            for question in questions
        ]
        found = word_log_odds(model, dataclasses.replace(self.words, prompts=prompts)).tolist()
        on_rows(
            [
                {"name": question.name, "log_odds": value}
                for question, value in zip(questions, found, strict=True)
            ]
        )
