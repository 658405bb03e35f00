"""Labelled texts by log-likelihood: how much likelier does a model find the wanted ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from expertsteer.data import LabelledExamples, RenderedText, render
from expertsteer.evaluation.scoring import mean_log_likelihoods
from expertsteer.models import LanguageModel

__all__ = ["LabelledText", "TextTask", "labelled_texts_of"]


class LabelledText(NamedTuple):
    """A text and whether it shows the wanted behaviour.

    Attributes
    ----------
    name : str
        Of the row in the data.
    text : RenderedText
    label : int
        +1 or -1.
    """

    name: str
    text: RenderedText
    label: int


def labelled_texts_of(
    examples: LabelledExamples, model: LanguageModel, chat_template: bool = False
) -> list[LabelledText]:
    """Return labelled examples as one model reads them."""
    rendered = render(examples, model.tokenizer, chat_template)
    labels = examples.labels.tolist()
    return [
        LabelledText(f"{group} {n}", text, label)
        for n, (group, text, label) in enumerate(
            zip(examples.groups, rendered, labels, strict=True)
        )
    ]


@dataclass(frozen=True)
class TextTask:
    """Labelled texts whose log-likelihood is measured, for `evaluate`.

    A row's ``preference`` is the text's mean log-likelihood a token in nats, turned round
    where the label is -1: its mean rises where the wanted texts become likelier than the
    unwanted ones.

    Attributes
    ----------
    questions : tuple of LabelledText
    source : dict
        Where the texts come from, for provenance.
    """

    questions: tuple[LabelledText, ...]
    source: dict[str, Any] = field(default_factory=dict)
    metrics: ClassVar[tuple[str, ...]] = ("preference",)

    def summary(self) -> dict[str, Any]:
        """Return what decides the rows, as plain JSON types."""
        return {"kind": "labelled texts"} | self.source

    def score(
        self,
        model: LanguageModel,
        questions: Sequence[LabelledText],
        on_rows: Callable[[list[dict[str, Any]]], None],
        progress: bool,
    ) -> None:
        """Measure some of the texts."""
        # A text of one token has no token to predict, and counts on neither side.
        scores = mean_log_likelihoods(model, [question.text for question in questions]).tolist()
        for question, score in zip(questions, scores, strict=True):
            value = question.label * score if score == score else 0.0
            on_rows([{"name": question.name, "right": question.label, "preference": value}])
