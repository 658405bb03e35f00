"""Labelled examples: what shows the wanted behaviour, and what shows its opposite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expertsteer.data.splits import SPLITS
from expertsteer.errors import DataError

__all__ = ["LabelledExamples", "RenderedText", "fingerprint_of", "render"]

# Stands in for an answer to find its place in a template; of Unicode's private use area,
# so neither a template's own marks nor, in practice, a text contains it.
_PLACEHOLDER = "\ue0a5\ue0a6\ue0a5"


class RenderedText(NamedTuple):
    """A text as one model reads it.

    Attributes
    ----------
    text : str
    answer_start : int
        Index of the answer's first character; 0 where there is no prompt.
    has_special_tokens : bool
        Whether a chat template wrote them, so that the tokenizer must not.
    content : str or None
        The text before the chat template, the same for every model; None where there
        is no template and ``text`` is it.
    """

    text: str
    answer_start: int
    has_special_tokens: bool
    content: str | None = None


def fingerprint_of(rows: Iterable[Iterable[str]]) -> str:
    """Return the SHA-256 of rows of texts, in order; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(("\x1f".join(row) + "\x1e").encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class LabelledExamples:
    """n examples, each a prompt, an answer and a label.

    A plain labelled text is an answer without a prompt. Prompt and answer stay apart
    because every model puts them into a chat template of its own.

    Attributes
    ----------
    prompts, answers : tuple of str
    labels : ndarray of shape (n,), int8
        +1 for the wanted behaviour or the right answer, -1 for its opposite.
    splits : tuple of str
        "train", "validation" or "test".
    groups : tuple of str
        Rows of one pair or one question share a group, and a group its split.
    source : str
        Where they come from.
    n_left_out : int
        Rows of the file that carry neither of the two label values asked for.

    Raises
    ------
    DataError
        If there are none, lengths differ, a label is neither +1 nor -1, a split has
        another name, or a group is in two splits.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    labels: np.ndarray
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    source: str = "memory"
    n_left_out: int = 0

    def __post_init__(self) -> None:
        n = len(self.answers)
        if n == 0:
            raise DataError(f"Got no examples from {self.source}, but expected at least one.")
        for name in ("prompts", "labels", "splits", "groups"):
            if len(getattr(self, name)) != n:
                raise DataError(f"Got {len(getattr(self, name))} {name} for {n} answers.")
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or not np.isin(labels, (-1, 1)).all():
            raise DataError("Got labels other than +1 and -1 in LabelledExamples.")
        object.__setattr__(self, "labels", labels.astype(np.int8))
        self._check_splits()

    def _check_splits(self) -> None:
        unknown = sorted(set(self.splits) - set(SPLITS))
        if unknown:
            raise DataError(
                f"Got the split {unknown[0]!r} in {self.source}, but expected one of "
                f"{', '.join(SPLITS)}."
            )
        split_of: dict[str, str] = {}
        for group, split in zip(self.groups, self.splits, strict=True):
            if split_of.setdefault(group, split) != split:
                raise DataError(
                    f"Got the group {group!r} of {self.source} in the splits {split_of[group]} and "
                    f"{split}, but expected each group in one split."
                )

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of prompts, answers and labels, in order; 16 hexadecimal digits."""
        return fingerprint_of(zip(self.prompts, self.answers, map(str, self.labels), strict=True))

    def summary(self) -> dict[str, Any]:
        """Return what provenance records: a file's name without its folders, hash and size."""
        file = Path(self.source)
        return {
            "source": file.name if file.exists() else self.source,
            "fingerprint": self.fingerprint,
            "n_examples": len(self),
        }

    def subset(self, rows: Iterable[int]) -> LabelledExamples:
        """Return some of the rows."""
        index = list(rows)
        return LabelledExamples(
            prompts=tuple(self.prompts[row] for row in index),
            answers=tuple(self.answers[row] for row in index),
            labels=self.labels[index],
            splits=tuple(self.splits[row] for row in index),
            groups=tuple(self.groups[row] for row in index),
            source=self.source,
            n_left_out=self.n_left_out,
        )

    def split(self, name: str) -> LabelledExamples:
        """Return the rows of one split.

        Raises
        ------
        DataError
            If the split is empty.
        """
        rows = [row for row, split in enumerate(self.splits) if split == name]
        if not rows:
            raise DataError(
                f"Got no rows in the split {name!r} of {self.source}, which holds "
                f"{self.describe_splits()}. Add rows, or leave the split column out to have the "
                "file split 60/20/20."
            )
        return self.subset(rows)

    def for_fitting(self) -> LabelledExamples:
        """Return the train and validation rows; the test split is for figures only."""
        return self.subset(row for row, split in enumerate(self.splits) if split != "test")

    def describe_splits(self) -> str:
        """Return the number of rows by split, for people."""
        counts = {name: self.splits.count(name) for name in SPLITS}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

    def require_both_classes(self, split: str = "train", min_rows: int = 8) -> None:
        """Raise unless a split holds enough rows of both classes.

        Parameters
        ----------
        split : str, default="train"
        min_rows : int, default=8
            Fewest rows a class.

        Raises
        ------
        DataError
            Saying how many there are.
        """
        labels = self.split(split).labels
        n_positive, n_negative = int((labels > 0).sum()), int((labels < 0).sum())
        if min(n_positive, n_negative) < min_rows:
            raise DataError(
                f"Got {n_positive} positive and {n_negative} negative rows in the {split} split of "
                f"{self.source}, but expected at least {min_rows} of each. Add rows."
            )


def render(
    examples: LabelledExamples, tokenizer: Any, chat_template: bool = False
) -> list[RenderedText]:
    """Return examples as one model reads them.

    Parameters
    ----------
    examples : LabelledExamples
    tokenizer : PreTrainedTokenizerBase
        Of the model; only its chat template is used.
    chat_template : bool, default=False
        Put prompt and answer into a user's and an assistant's turn. A text without a
        prompt becomes a user's turn that an answer is about to follow.

    Returns
    -------
    list of RenderedText
        With the template, a text ends where its answer ends: what the template closes
        a turn with is cut, so that the last token is the answer's own.

    Raises
    ------
    DataError
        If the tokenizer has no chat template.
    """
    if not chat_template:
        return [_plain(p, a) for p, a in zip(examples.prompts, examples.answers, strict=True)]
    if getattr(tokenizer, "chat_template", None) is None:
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise DataError(
            f"Got chat_template=True, but the tokenizer of {name} has none, as is usual for base "
            "models. Leave the chat template off, or use an instruction-tuned model."
        )
    return [
        _templated(tokenizer, p, a) for p, a in zip(examples.prompts, examples.answers, strict=True)
    ]


def _plain(prompt: str, answer: str) -> RenderedText:
    apart = prompt and not prompt[-1].isspace() and not answer[:1].isspace()
    text = prompt + (" " if apart else "") + answer
    start = len(text) - len(answer.lstrip())
    return RenderedText(text, start if prompt else 0, False)


def _templated(tokenizer: Any, prompt: str, answer: str) -> RenderedText:
    content = _plain(prompt, answer).text
    if not prompt:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": answer}], tokenize=False, add_generation_prompt=True
        )
        return RenderedText(text, 0, True, content)
    answer = answer.strip()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        tokenize=False,
    )
    # Not a search for the answer itself: "d" also occurs in "<|im_end|>".
    start = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": _PLACEHOLDER}],
        tokenize=False,
    ).rfind(_PLACEHOLDER)
    if start < 0 or not text.startswith(answer, start):
        raise DataError(
            f"Got a chat template that rewrites the answer {answer[:40]!r}, so its place cannot be "
            "found. Leave the chat template off."
        )
    return RenderedText(text[: start + len(answer)], start, True, content)
