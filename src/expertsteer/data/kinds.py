"""Kinds of rows, and what examples each becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertsteer.data.answers import ANSWER_SIGN, question_prompt
from expertsteer.data.splits import Row
from expertsteer.errors import DataError, ParameterError

__all__ = ["KINDS", "Example", "Kind", "LabelReader", "kind_of", "text_of", "word_of"]


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, an answer and +1 or -1."""

    prompt: str
    answer: str
    label: int


_Convert = Callable[[dict[str, Any], str, "LabelReader"], Iterator[Example]]


@dataclass(frozen=True)
class Kind:
    """Fields a kind of row needs, and how a row becomes examples."""

    fields: tuple[str, ...]
    convert: _Convert


class LabelReader:
    """Reads label values as +1, -1, or None for a row that is left out."""

    _POSITIVE = frozenset({"1", "+1", "true", "yes", "positive"})
    _NEGATIVE = frozenset({"0", "-1", "false", "no", "negative"})

    def __init__(self, positive: str | None = None, negative: str | None = None) -> None:
        if positive is None and negative is not None:
            raise ParameterError(f"Got negative={negative!r} without positive; name both.")
        self.positive = word_of(positive) if positive is not None else None
        self.negative = word_of(negative) if negative is not None else None

    def read(self, value: Any, place: str) -> int | None:
        """Return the label that a value stands for; DataError if it stands for none."""
        word = word_of(value)
        if word in ("", "nan"):  # or a missing label would count as "every other value"
            raise DataError(f"{place}: got the label {value!r}, but expected one in every row.")
        if self.positive is not None:
            if word == self.positive:
                return 1
            return -1 if self.negative in (None, word) else None
        if word in self._POSITIVE:
            return 1
        if word in self._NEGATIVE:
            return -1
        raise DataError(
            f"{place}: got the label {value!r}, but expected 1 or 0, +1 or -1, true or false, "
            "yes or no, positive or negative. For others name the positive one (--positive VALUE)."
        )


def word_of(value: Any) -> str:
    """Return a label's value as text, so that 1, 1.0 and "1" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def text_of(row: Mapping[str, Any], field: str, place: str) -> str:
    """Return a field of a row that has to be text.

    Raises
    ------
    DataError
        If it is missing, no text, or not whole.
    """
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: got {field}={value!r}, but expected some text.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{place}: got {field} with half a character (a lone surrogate). Mend it.")
    return value


def _labelled(row: dict[str, Any], place: str, labels: LabelReader) -> Iterator[Example]:
    label = labels.read(row["label"], place)
    if label is not None:
        yield Example("", text_of(row, "text", place), label)


def _pair(row: dict[str, Any], place: str, _: LabelReader) -> Iterator[Example]:
    prompt = text_of(row, "prompt", place) if row.get("prompt") else ""
    yield Example(prompt, text_of(row, "positive", place), 1)
    yield Example(prompt, text_of(row, "negative", place), -1)


def _multiple_choice(row: dict[str, Any], place: str, _: LabelReader) -> Iterator[Example]:
    choices, names = row["choices"], None
    if isinstance(choices, Mapping):  # the hub's ARC: {"text": [...], "label": [...]}
        choices, names = choices.get("text"), choices.get("label")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise DataError(f"{place}: got choices={choices!r}, but expected a list of two or more.")
    texts = [
        str(choice) if isinstance(choice, bool) else text_of({"choice": choice}, "choice", place)
        for choice in choices
    ]
    answer = row["answer"]
    if names and answer in names:  # some of ARC's go from "1" up
        answer = list(names).index(answer)
    answer = _answer_index(answer, texts, place)
    context = f"{text_of(row, 'context', place).strip()}\n" if row.get("context") else ""
    prompt = question_prompt(text_of(row, "question", place).strip(), context)
    for index, text in enumerate(texts):
        yield Example(prompt, text, 1 if index == answer else -1)


def _answer_index(answer: Any, choices: list[str], place: str) -> int:
    if isinstance(answer, str):
        if answer.strip() in choices:
            return choices.index(answer.strip())
        word = answer.strip()
        if len(word) == 1 and word.isascii() and word.isalpha():
            answer = ord(word.upper()) - ord("A")
        elif word.isdecimal():
            answer = int(word)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{place}: got answer={answer!r}, but expected an index from 0 to {len(choices) - 1}, "
            "a letter, or the text of a choice."
        )
    return answer


def _statement(row: dict[str, Any], place: str, _: LabelReader) -> Iterator[Example]:
    matches = word_of(row["matches"])
    if matches not in ("yes", "no"):
        raise DataError(f"{place}: got matches={row['matches']!r}, but expected Yes or No.")
    for answer in ("Yes", "No"):
        yield Example(text_of(row, "prompt", place), answer, 1 if answer.lower() == matches else -1)


def _prompt_answer(row: dict[str, Any], place: str, labels: LabelReader) -> Iterator[Example]:
    label = labels.read(row["label"], place)
    if label is not None:
        yield Example(text_of(row, "prompt", place), text_of(row, "answer", place), label)


def _open_answer(row: dict[str, Any], place: str, _: LabelReader) -> Iterator[Example]:
    prompt = question_prompt(text_of(row, "question", place).strip())
    yield Example(prompt, f"{ANSWER_SIGN} {text_of(row, 'answer', place).strip()}", 1)


def _true_false(row: dict[str, Any], place: str, labels: LabelReader) -> Iterator[Example]:
    label = labels.read(row["label"], place)
    if label is None:
        return
    statement = text_of(row, "text", place).strip()
    prompt = f'Is the following statement true or false?\n"{statement}"\nAnswer:'
    yield Example(prompt, "True", label)
    yield Example(prompt, "False", -label)


# In the order in which "auto" tries them: the more fields, the more telling. A kind behind
# another with the same fields has to be asked for.
KINDS: dict[str, Kind] = {
    "multiple_choice": Kind(("question", "choices", "answer"), _multiple_choice),
    "prompt_answer": Kind(("prompt", "answer", "label"), _prompt_answer),
    "pairs": Kind(("positive", "negative"), _pair),
    "labelled": Kind(("text", "label"), _labelled),
    "statement": Kind(("prompt", "matches"), _statement),
    "open_answer": Kind(("question", "answer"), _open_answer),
    "true_false": Kind(("text", "label"), _true_false),
}


def kind_of(rows: list[Row], kind: str, source: str) -> str:
    """Return the kind of a file's rows: the one asked for, or by its columns with "auto".

    Raises
    ------
    DataError
        If the rows lack the columns.
    ParameterError
        If there is no such kind.
    """
    if kind != "auto" and kind not in KINDS:
        raise ParameterError(f"Got kind={kind!r}, but expected auto or one of {', '.join(KINDS)}.")
    present = set(rows[0][1])
    fitting = [name for name, k in KINDS.items() if set(k.fields) <= present]
    if kind == "auto" and fitting:
        return fitting[0]
    if kind in fitting:
        return kind
    needs = "; ".join(f"{name}: {', '.join(k.fields)}" for name, k in KINDS.items())
    raise DataError(
        f"Got {source} with the columns {', '.join(sorted(present))}, but expected those of "
        f"{'a known kind' if kind == 'auto' else kind} ({needs}). Rename them with columns "
        "(--column FIELD=COLUMN)."
    )
