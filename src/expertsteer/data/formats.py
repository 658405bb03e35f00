"""Load rows, and turn them into labelled examples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertsteer.data.answers import ANSWER_SIGN, same_answer
from expertsteer.data.examples import LabelledExamples
from expertsteer.data.kinds import KINDS, Example, LabelReader, kind_of, word_of
from expertsteer.data.readers import read_rows
from expertsteer.data.splits import Row, assign_splits, complete_splits
from expertsteer.errors import DataError, ParameterError

__all__ = ["examples_of", "group_of", "load_examples", "load_rows"]


def load_rows(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
) -> list[Row]:
    """Load rows with our names for columns and splits.

    Parameters
    ----------
    source, folder : str or Path
        See `read_rows`.
    columns : mapping of str to str, optional
        From a field to the file's column.
    roles : mapping of str to str, optional
        See `assign_splits`.

    Returns
    -------
    list of (str, dict)
        Each row with where it stands.

    Raises
    ------
    DataError
        On an unusable file, a column or split it does not have, or a split of unknown name.
    ParameterError
        On an unknown field or role.
    """
    rows = _rename_columns(read_rows(source, folder), columns or {})
    return assign_splits(rows, roles, str(source))


def load_examples(
    source: str | Path,
    *,
    kind: str = "auto",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    positive: str | None = None,
    negative: str | None = None,
    split_fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    limit: int | None = None,
) -> LabelledExamples:
    """Load labelled examples from a file, a benchmark or a data set.

    Parameters
    ----------
    source : str or Path
        See `read_rows`.
    kind : str, default="auto"
        - "labelled": text, label
        - "pairs": positive, negative, and a prompt where there is one
        - "multiple_choice": question, choices, answer (index, letter or text), and a
          context where there is one; the right answer is +1, every wrong one -1
        - "prompt_answer": prompt, answer, label
        - "statement": prompt, matches ("Yes" or "No"), one row for each answer
        - "open_answer": question, answer; the right answer is +1, the answer to another
          question of the split, drawn at random, is -1
        - "true_false": text, label; asks whether the text is true, one row for each
          answer; only when named, as its columns are those of "labelled"

        "auto" goes by the columns. Any kind may have the columns "split", in every row or
        in none, and "group", whose rows stay in one split.
    columns : mapping of str to str, optional
        From a field above to the file's column, such as {"label": "emotion"}.
    roles : mapping of str to str, optional
        From train, validation or test to the file's split that serves as it, such as
        {"test": "validation_matched"}; see `assign_splits`.
    folder : str or Path, optional
        Local copies of the benchmarks; see `read_rows`.
    positive, negative : str, optional
        Label values that count as +1 and -1. Rows of other values are left out; without
        ``negative`` every other value is -1.
    split_fractions : tuple of 3 float, default=(0.6, 0.2, 0.2)
        Train, validation and test, where the file has no column "split".
    seed : int, default=0
        Of the split, of ``limit`` and of wrong answers.
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
    rows = load_rows(source, columns=columns, roles=roles, folder=folder)
    return examples_of(
        rows,
        kind_of(rows, kind, str(source)),
        str(source),
        labels=LabelReader(positive, negative),
        split_fractions=split_fractions,
        seed=seed,
        limit=limit,
    )


def examples_of(
    rows: list[Row],
    kind: str,
    source: str,
    *,
    labels: LabelReader | None = None,
    split_fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    limit: int | None = None,
) -> LabelledExamples:
    """Return the examples that rows of a kind become.

    Parameters
    ----------
    rows : list of (str, dict)
        From `load_rows`.
    kind : str
        One of `KINDS`.
    source : str
        Where the rows come from.
    labels : LabelReader, optional
    split_fractions, seed, limit
        See `load_examples`.

    Raises
    ------
    DataError
        On an unusable row, naming the line.
    ParameterError
        On unusable settings.
    """
    chosen, labels = KINDS[kind], labels or LabelReader()
    if limit is not None and limit < 1:
        raise ParameterError(f"Got limit={limit}, but expected at least 1.")
    examples: list[Example] = []
    groups: list[str] = []
    splits: list[str] = []
    numbers: list[int] = []
    n_left_out = 0
    for number, (place, row) in enumerate(rows):
        missing = [field for field in chosen.fields if row.get(field) is None]
        if missing:
            raise DataError(f"{place}: got no {missing[0]}, but expected one in every row.")
        made = list(chosen.convert(row, place, labels))
        n_left_out += not made
        examples += made
        groups += [group_of(row, number)] * len(made)
        splits += [row.get("split") or ""] * len(made)
        numbers += [number] * len(made)
    if not examples:
        raise DataError(
            f"Got {source} with no row labelled {labels.positive!r} or {labels.negative!r}. "
            f"Its labels are "
            f"{', '.join(sorted({word_of(r.get('label')) for _, r in rows})[:12])}."
        )
    values = np.array([example.label for example in examples], dtype=np.int8)
    splits = complete_splits(splits, groups, values, source, split_fractions, seed)
    if kind == "open_answer":
        wrong = _wrong_answers(examples, splits, source, seed)
        examples = [each for pair in zip(examples, wrong, strict=True) for each in pair]
        groups = [group for group in groups for _ in range(2)]
        splits = [split for split in splits for _ in range(2)]
        numbers = [number for number in numbers for _ in range(2)]
        values = np.tile(np.array([1, -1], dtype=np.int8), len(wrong))
    _warn_of_contradictions(examples, source)
    loaded = LabelledExamples(
        prompts=tuple(example.prompt for example in examples),
        answers=tuple(example.answer for example in examples),
        labels=values,
        splits=tuple(splits),
        groups=tuple(groups),
        source=source,
        n_left_out=n_left_out,
    )
    if limit is None or limit >= len(rows):
        return loaded
    # Only now, so that a row's split is the same with and without a limit.
    kept = set(np.random.default_rng(seed).permutation(len(rows))[:limit].tolist())
    return loaded.subset(place for place, number in enumerate(numbers) if number in kept)


def group_of(row: Mapping[str, Any], number: int) -> str:
    """Return the group of a file's row, by default one of its own."""
    value = row.get("group")
    return f"row {number}" if value is None or value == "" else str(value)


def _wrong_answers(
    examples: Sequence[Example], splits: Sequence[str], source: str, seed: int
) -> list[Example]:
    """Return each question with the answer to another one of its split."""
    rng = np.random.default_rng(seed)
    places = {split: [n for n, name in enumerate(splits) if name == split] for split in set(splits)}
    shuffled = {split: rng.permutation(places[split]) for split in sorted(places)}
    answers = [example.answer.removeprefix(ANSWER_SIGN).strip() for example in examples]
    wrong = []
    for number, (example, split) in enumerate(zip(examples, splits, strict=True)):
        others = shuffled[split]
        start = int(rng.integers(len(others)))
        for offset in range(len(others)):
            other = int(others[(start + offset) % len(others)])
            if not same_answer(answers[other], answers[number]):
                wrong.append(Example(example.prompt, examples[other].answer, -1))
                break
        else:
            raise DataError(
                f"Got {answers[number]!r} as the answer to every question in the {split} split of "
                f"{source}, but expected different ones: a wrong answer is that to another "
                "question. Add rows, or a column choices."
            )
    return wrong


def _rename_columns(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    known = sorted(
        {field for kind in KINDS.values() for field in kind.fields}
        | {"context", "group", "id", "rationale", "split"}
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


def _warn_of_contradictions(examples: list[Example], source: str) -> None:
    seen: dict[tuple[str, str], int] = {}
    contradictory = {
        (e.prompt, e.answer)
        for e in examples
        if seen.setdefault((e.prompt, e.answer), e.label) != e.label
    }
    if contradictory:
        warnings.warn(
            f"{len(contradictory)} texts of {source} occur with both labels.", stacklevel=4
        )
