"""Unlabelled text: what alignments are fitted on and damage is measured on."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from expertsteer.data.kinds import text_of
from expertsteer.data.readers import TABLE_SUFFIXES, read_rows, read_text
from expertsteer.data.shipped import shipped_file
from expertsteer.errors import DataError, ParameterError

__all__ = [
    "draw_sentences",
    "load_plain_lines",
    "load_plain_text",
    "sentence_beginnings",
    "split_sentences",
]

# An end of sentence: closing punctuation, perhaps a quote, white space, and a capital,
# quote or digit next. Only the white space is matched, so that the quote stays.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])")
# The fewest words of a sentence that is drawn.
_SHORTEST = 6
_HEADING = re.compile(r"^\s*(=+ .* =+|#+ .*)\s*$")


def load_plain_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises
    ------
    DataError
        If the file is missing, unreadable, not UTF-8 or empty.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"Got {path}, which is empty, but expected some text.")
    return lines


def load_plain_text(path: str | Path | None = None) -> list[str]:
    """Return the sentences of a plain text.

    Lines are split at closing punctuation followed by a capital or a digit; headings
    (``= Title =`` or ``# Title``) are dropped.

    Parameters
    ----------
    path : str or Path, optional
        A UTF-8 text file, or a file of rows (``.jsonl``, ``.json``, ``.csv``, ``.parquet``)
        whose ``text`` is read and nothing else; default: a small text that comes with the
        package.

    Returns
    -------
    list of str

    Raises
    ------
    DataError
        If the file is missing, unreadable, not UTF-8, or has no sentence, or a row no text.
    """
    path = Path(path or shipped_file("plain.txt"))
    is_table = path.suffix.lower() in TABLE_SUFFIXES
    sentences = [
        sentence.strip()
        for line in (_lines_of_rows(path) if is_table else load_plain_lines(path))
        if not _HEADING.match(line)
        for sentence in _SENTENCE_END.split(line)
    ]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise DataError(f"Got {path}, which has headings only, but expected some text.")
    return sentences


def draw_sentences(sentences: Sequence[str], n: int) -> list[str]:
    """Draw sentences from all over a text, since neighbours are of one subject.

    Parameters
    ----------
    sentences : sequence of str
    n : int

    Returns
    -------
    list of str
        Different ones of more than 5 words; the same at every call.

    Raises
    ------
    DataError
        If there are fewer.
    """
    whole = _whole(sentences)
    if len(whole) < n:
        raise DataError(
            f"Got plain text with {len(whole)} sentences of more than {_SHORTEST - 1} words, but "
            f"expected {n} or more. Name a longer file or choose a smaller n_plain."
        )
    return random.Random(0).sample(whole, n)


def split_sentences(sentences: Sequence[str], n: int) -> tuple[list[str], list[str]]:
    """Draw sentences that strengths are set by, and others that damage is reported on.

    Parameters
    ----------
    sentences : sequence of str
    n : int
        Most of each.

    Returns
    -------
    budget, test : list of str
        No sentence is in both, whatever ``n`` either is drawn with.

    Raises
    ------
    DataError
        If there are not two sentences of more than 5 words.
    """
    n_whole = len(_whole(sentences))
    if n_whole < 2:
        raise DataError(
            f"Got plain text with {n_whole} sentences of more than {_SHORTEST - 1} words, but "
            "expected 2 or more: one to set strengths by and one to report damage on. Name a "
            "longer file."
        )
    drawn = draw_sentences(sentences, n_whole)
    return drawn[::2][:n], drawn[1::2][:n]


def _whole(sentences: Sequence[str]) -> list[str]:
    # Headings and fragments have little to predict.
    return list(dict.fromkeys(s for s in sentences if len(s.split()) >= _SHORTEST))


def _lines_of_rows(path: Path) -> list[str]:
    texts = [text_of(row, "text", place) for place, row in read_rows(path)]
    return [line for text in texts for line in text.splitlines()]


def sentence_beginnings(
    sentences: list[str],
    n: int,
    *,
    n_sentences: int | None = None,
    seed: int = 0,
    min_words: int = 3,
    max_words: int = 40,
) -> list[str]:
    """Return beginnings of sentences, each cut after a random word.

    The last tokens of such beginnings are as varied as the tokens a model generates
    from, which the ends of whole sentences (full stops) are not.

    Parameters
    ----------
    sentences : list of str
    n : int
        How many beginnings.
    n_sentences : int, optional
        Take them from this many of the sentences, drawn at random; default: from all.
        Beginnings of one sentence are read in one pass, so that many of few sentences
        cost less than as many of many.
    seed : int, default=0
    min_words, max_words : int, default=3, 40
        Length of a beginning.

    Returns
    -------
    list of str
        Distinct, in random order; every sentence is used about equally often.

    Raises
    ------
    DataError
        If the sentences do not yield as many.
    ParameterError
        On lengths out of range.
    """
    if n < 1 or not 1 <= min_words <= max_words:
        raise ParameterError(
            f"Got n={n}, min_words={min_words}, max_words={max_words}, but expected n from 1 up "
            "and 1 <= min_words <= max_words."
        )
    if n_sentences is not None and n_sentences < 1:
        raise ParameterError(f"Got n_sentences={n_sentences}, but expected 1 or more.")
    rng = random.Random(seed)
    cuts = []
    for words in (sentence.split() for sentence in sentences):
        lengths = list(range(min_words, min(len(words), max_words) + 1))
        rng.shuffle(lengths)
        if lengths:
            cuts.append((words, lengths))
    rng.shuffle(cuts)
    if n_sentences is not None:
        cuts = cuts[:n_sentences]
    found: dict[str, None] = {}
    # Every sentence gives one beginning before any gives another.
    for round_ in range(max((len(lengths) for _, lengths in cuts), default=0)):
        for words, lengths in cuts:
            if round_ < len(lengths):
                found.setdefault(" ".join(words[: lengths[round_]]))
            if len(found) == n:
                return list(found)
    raise DataError(
        f"Got a text of {len(cuts)} sentences, which yields {len(found)} beginnings, but "
        f"expected {n}. Use a longer text, more of its sentences or fewer beginnings."
    )
