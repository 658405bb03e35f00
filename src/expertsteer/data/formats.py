"""Turn rows of the usual kinds into labelled examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertsteer.data.examples import LabelledExamples
from expertsteer.data.readers import Row, read_rows
from expertsteer.errors import DataError, ParameterError

__all__ = ["KINDS", "load_examples", "rename_columns", "split_of"]


@dataclass(frozen=True)
class _Example:
    prompt: str
    answer: str
    label: int


_Convert = Callable[[dict[str, Any], str, "_Labels"], Iterator[_Example]]


@dataclass(frozen=True)
class _Kind:
    """Fields a kind of row needs, and how a row becomes examples."""

    fields: tuple[str, ...]
    convert: _Convert


class _Labels:
    """Reads label values as +1, -1, or None for a row that is left out."""

    _POSITIVE = frozenset({"1", "+1", "true", "yes", "positive"})
    _NEGATIVE = frozenset({"0", "-1", "false", "no", "negative"})

    def __init__(self, positive: str | None, negative: str | None) -> None:
        if positive is None and negative is not None:
            raise ParameterError(f"Got negative={negative!r} without positive; name both.")
        self.positive = _word(positive) if positive is not None else None
        self.negative = _word(negative) if negative is not None else None

    def read(self, value: Any, place: str) -> int | None:
        word = _word(value)
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


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def _text(row: Mapping[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: got {field}={value!r}, but expected some text.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{place}: got {field} with half a character (a lone surrogate). Mend it.")
    return value


def _labelled(row: dict[str, Any], place: str, labels: _Labels) -> Iterator[_Example]:
    label = labels.read(row["label"], place)
    if label is not None:
        yield _Example("", _text(row, "text", place), label)


def _pair(row: dict[str, Any], place: str, _: _Labels) -> Iterator[_Example]:
    prompt = _text(row, "prompt", place) if row.get("prompt") else ""
    yield _Example(prompt, _text(row, "positive", place), 1)
    yield _Example(prompt, _text(row, "negative", place), -1)


def _multiple_choice(row: dict[str, Any], place: str, _: _Labels) -> Iterator[_Example]:
    choices, names = row["choices"], None
    if isinstance(choices, Mapping):  # the hub's ARC: {"text": [...], "label": [...]}
        choices, names = choices.get("text"), choices.get("label")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise DataError(f"{place}: got choices={choices!r}, but expected a list of two or more.")
    texts = [
        str(choice) if isinstance(choice, bool) else _text({"choice": choice}, "choice", place)
        for choice in choices
    ]
    answer = row["answer"]
    if names and answer in names:  # some of ARC's go from "1" up
        answer = list(names).index(answer)
    answer = _answer_index(answer, texts, place)
    context = f"{_text(row, 'context', place).strip()}\n" if row.get("context") else ""
    prompt = f"{context}Question: {_text(row, 'question', place).strip()}\nAnswer:"
    for index, text in enumerate(texts):
        yield _Example(prompt, text, 1 if index == answer else -1)


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


def _statement(row: dict[str, Any], place: str, _: _Labels) -> Iterator[_Example]:
    matches = _word(row["matches"])
    if matches not in ("yes", "no"):
        raise DataError(f"{place}: got matches={row['matches']!r}, but expected Yes or No.")
    for answer in ("Yes", "No"):
        yield _Example(_text(row, "prompt", place), answer, 1 if answer.lower() == matches else -1)


def _prompt_answer(row: dict[str, Any], place: str, labels: _Labels) -> Iterator[_Example]:
    label = labels.read(row["label"], place)
    if label is not None:
        yield _Example(_text(row, "prompt", place), _text(row, "answer", place), label)


# In the order in which "auto" tries them: the more fields, the more telling.
KINDS: dict[str, _Kind] = {
    "multiple_choice": _Kind(("question", "choices", "answer"), _multiple_choice),
    "prompt_answer": _Kind(("prompt", "answer", "label"), _prompt_answer),
    "pairs": _Kind(("positive", "negative"), _pair),
    "labelled": _Kind(("text", "label"), _labelled),
    "statement": _Kind(("prompt", "matches"), _statement),
}

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def load_examples(
    source: str | Path,
    *,
    kind: str = "auto",
    columns: Mapping[str, str] | None = None,
    positive: str | None = None,
    negative: str | None = None,
    split_fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    limit: int | None = None,
) -> LabelledExamples:
    """Load labelled examples from a file or a data set.

    Parameters
    ----------
    source : str or Path
        See `read_rows`.
    kind : {"auto", "labelled", "pairs", "multiple_choice", "prompt_answer", "statement"}
        - "labelled": text, label
        - "pairs": positive, negative, and a prompt where there is one
        - "multiple_choice": question, choices, answer (index, letter or text), and a
          context where there is one; the right answer is +1, every wrong one -1
        - "prompt_answer": prompt, answer, label
        - "statement": prompt, matches ("Yes" or "No"), one row for each answer

        "auto", the default, goes by the columns. Any kind may have the columns "split", in
        every row or in none, and "group", whose rows stay in one split.
    columns : mapping of str to str, optional
        From a field above to the file's column, such as {"label": "emotion"}.
    positive, negative : str, optional
        Label values that count as +1 and -1. Rows of other values are left out; without
        ``negative`` every other value is -1.
    split_fractions : tuple of 3 float, default=(0.6, 0.2, 0.2)
        Train, validation and test, where the file has no column "split".
    seed : int, default=0
        Of the split and of ``limit``.
    limit : int, optional
        Most rows of the file to use, drawn at random.

    Returns
    -------
    LabelledExamples

    Raises
    ------
    DataError
        On an unusable file or row, naming the line.
    ParameterError
        On unusable settings.
    """
    labels = _Labels(positive, negative)
    rows = rename_columns(read_rows(source), columns or {})
    chosen = KINDS[_kind_of(rows, kind, str(source))]
    if limit is not None:
        if limit < 1:
            raise ParameterError(f"Got limit={limit}, but expected at least 1.")
        order = np.random.default_rng(seed).permutation(len(rows))[:limit]
        rows = [rows[index] for index in sorted(order)]

    examples: list[_Example] = []
    groups: list[str] = []
    splits: list[str] = []
    n_left_out = 0
    for number, (place, row) in enumerate(rows):
        missing = [field for field in chosen.fields if row.get(field) is None]
        if missing:
            raise DataError(f"{place}: got no {missing[0]}, but expected one in every row.")
        made = list(chosen.convert(row, place, labels))
        n_left_out += not made
        examples += made
        groups += [_group_of(row, number)] * len(made)
        splits += [split_of(row, place)] * len(made)
    if not examples:
        raise DataError(
            f"Got {source} with no row labelled {positive!r} or {negative!r}. "
            f"Its labels are {', '.join(sorted({_word(r.get('label')) for _, r in rows})[:12])}."
        )
    _warn_of_contradictions(examples, str(source))
    values = np.array([example.label for example in examples], dtype=np.int8)
    if not any(splits):
        splits = _draw_splits(groups, values, split_fractions, seed)
    elif not all(splits):
        raise DataError(
            f"Got {source} with a split in some rows only, but expected one in every row or none."
        )
    return LabelledExamples(
        prompts=tuple(example.prompt for example in examples),
        answers=tuple(example.answer for example in examples),
        labels=values,
        splits=tuple(splits),
        groups=tuple(groups),
        source=str(source),
        n_left_out=n_left_out,
    )


def rename_columns(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    """Return rows with a file's columns under the names of our fields.

    Raises
    ------
    DataError or ParameterError
        On an unknown field or a column the rows do not have.
    """
    known = sorted(
        {field for kind in KINDS.values() for field in kind.fields} | {"context", "group", "split"}
    )
    present = sorted({name for _, row in rows for name in row})
    for field, column in columns.items():
        if field not in known:
            raise ParameterError(
                f"Got columns for {field!r}, but expected one of {', '.join(known)}."
            )
        if column not in present:
            raise DataError(
                f"Got the column {column!r} for {field!r}, but {rows[0][0].split(':')[0]} has the "
                f"columns {', '.join(present)}."
            )
    return [
        (place, row | {field: row.get(column) for field, column in columns.items()})
        for place, row in rows
    ]


def _kind_of(rows: list[Row], kind: str, source: str) -> str:
    if kind != "auto" and kind not in KINDS:
        raise ParameterError(f"Got kind={kind!r}, but expected auto or one of {', '.join(KINDS)}.")
    present = set(rows[0][1])
    fitting = [name for name, k in KINDS.items() if set(k.fields) <= present]
    if kind == "auto" and fitting:
        return fitting[0]
    if kind in fitting:
        return kind
    if kind == "auto" and {"question", "answer"} <= present:
        raise DataError(
            f"Got {source} with right answers only, but expected wrong ones too. Add a column "
            "choices (the right and wrong answers of each question)."
        )
    needs = "; ".join(f"{name}: {', '.join(k.fields)}" for name, k in KINDS.items())
    raise DataError(
        f"Got {source} with the columns {', '.join(sorted(present))}, but expected those of "
        f"{'a known kind' if kind == 'auto' else kind} ({needs}). Rename them with columns "
        "(--column FIELD=COLUMN)."
    )


def split_of(row: Mapping[str, Any], place: str) -> str:
    """Return a row's split by our names, "" where it has none.

    Raises
    ------
    DataError
        If the split has another name.
    """
    value = row.get("split")
    if value is None:
        return ""
    try:
        return _SPLIT_NAMES[_word(value)]
    except KeyError:
        raise DataError(
            f"{place}: got split={value!r}, but expected train, validation or test."
        ) from None


def _group_of(row: Mapping[str, Any], number: int) -> str:
    value = row.get("group")
    return f"row {number}" if value is None or value == "" else str(value)


def _draw_splits(
    groups: list[str], labels: np.ndarray, fractions: tuple[float, float, float], seed: int
) -> list[str]:
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0):
        raise ParameterError(
            f"Got split_fractions={fractions}, but expected three numbers from 0 up that sum to 1."
        )
    first = {group: int(label) for group, label in reversed(list(zip(groups, labels, strict=True)))}
    names: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for label in (1, -1):  # each class apart, so that every split gets its share of both
        members = [group for group, value in first.items() if value == label]
        bounds = np.round(np.cumsum(fractions) * len(members)).astype(int)
        for place, index in enumerate(rng.permutation(len(members))):
            split = int(np.searchsorted(bounds, place, side="right"))
            names[members[index]] = ("train", "validation", "test")[min(split, 2)]
    return [names[group] for group in groups]


def _warn_of_contradictions(examples: list[_Example], source: str) -> None:
    seen: dict[tuple[str, str], int] = {}
    contradictory = {
        (e.prompt, e.answer)
        for e in examples
        if seen.setdefault((e.prompt, e.answer), e.label) != e.label
    }
    if contradictory:
        warnings.warn(
            f"{len(contradictory)} texts of {source} occur with both labels.", stacklevel=3
        )
