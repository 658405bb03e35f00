"""Which tokens of a text a state is read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import total_ordering
from typing import NamedTuple, overload

import numpy as np

from expertsteer.data import RenderedText
from expertsteer.errors import DataError, ParameterError
from expertsteer.models import LanguageModel

__all__ = ["TOKEN_POSITIONS", "TokenIds", "TokenSpan", "locate_tokens"]

TOKEN_POSITIONS = ("last", "answer_mean", "prompt_last")


# Big-endian, so that bytes have the order of the ids they hold.
_PACKED = np.dtype(">u4")


@total_ordering
class TokenIds(Sequence[int]):
    """A text's token ids, which compare and hash as a tuple of them does.

    In 4 bytes an id, where a tuple of integers takes 40: those of all texts are held while
    states are collected.

    Parameters
    ----------
    ids : sequence of int
        From 0 to 2**32 - 1.
    """

    __slots__ = ("_packed",)

    def __init__(self, ids: Sequence[int]) -> None:
        self._packed = np.asarray(ids, dtype=_PACKED).tobytes()

    def __bytes__(self) -> bytes:
        return self._packed

    def __len__(self) -> int:
        return len(self._packed) // _PACKED.itemsize

    def __iter__(self) -> Iterator[int]:
        return iter(self._values().tolist())

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...
    def __getitem__(self, index: int | slice) -> int | TokenIds:
        found = self._values()[index]
        return TokenIds(found.tolist()) if isinstance(index, slice) else int(found)

    def __eq__(self, other: object) -> bool:
        return self._packed == other._packed if isinstance(other, TokenIds) else NotImplemented

    def __lt__(self, other: TokenIds) -> bool:
        return self._packed < other._packed

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"TokenIds({list(self)})"

    def starts_with(self, beginning: TokenIds) -> bool:
        """Return whether these ids begin with some others."""
        return self._packed.startswith(beginning._packed)

    def _values(self) -> np.ndarray:
        return np.frombuffer(self._packed, dtype=_PACKED)


class TokenSpan(NamedTuple):
    """A tokenised text and the tokens ``[start, end)`` whose states are averaged."""

    ids: TokenIds
    start: int
    end: int


def locate_tokens(
    model: LanguageModel, texts: Sequence[RenderedText], position: str = "last"
) -> tuple[list[TokenSpan], int]:
    """Tokenise texts and find the tokens a state is read from.

    Parameters
    ----------
    model : LanguageModel
        Supplies the tokenizer and the context length.
    texts : sequence of RenderedText
        The texts; ``answer_start`` tells the prompt from the answer.
    position : {"last", "answer_mean", "prompt_last"}, default="last"
        The text's last token, the mean over the answer's tokens, or the last token
        of the prompt.

    Returns
    -------
    spans : list of TokenSpan
        One a text, without padding.
    n_cut : int
        How many texts were longer than the model's context; these lose their
        beginning (behind the first token, which many models need as an anchor).

    Raises
    ------
    ParameterError
        On an unknown position.
    DataError
        If a text has no tokens, or none at the position.
    """
    if position not in TOKEN_POSITIONS:
        raise ParameterError(
            f"Got position={position!r}, but expected one of {', '.join(TOKEN_POSITIONS)}."
        )
    tokenizer = model.tokenizer
    by_answer = position != "last"
    if by_answer and not tokenizer.is_fast:
        raise DataError(
            f"Got position={position!r}, but expected position='last': the tokenizer of "
            f"{model.name} does not report character offsets."
        )
    spans: list[TokenSpan] = []
    n_cut = 0
    limit = model.context_length
    for row, text in enumerate(texts):
        encoded = tokenizer(
            text.text,
            add_special_tokens=not text.has_special_tokens,
            return_offsets_mapping=by_answer,
            verbose=False,
        )
        ids = encoded["input_ids"]
        start, end = len(ids) - 1, len(ids)
        if by_answer:
            # Special tokens have empty spans; the answer begins with the first token
            # that ends behind its first character.
            ends = [stop for _, stop in encoded["offset_mapping"]]
            first = next((k for k, stop in enumerate(ends) if stop > text.answer_start), len(ids))
            start, end = (first, len(ids)) if position == "answer_mean" else (first - 1, first)
        if not ids or start < 0 or start >= end:
            raise DataError(
                f"Got text {row + 1} ({text.text[:40]!r}), but expected a token at position "
                f"{position!r}. Remove the row or choose another position."
            )
        if len(ids) > limit:
            n_cut += 1
            lost = len(ids) - limit
            if 0 < end - 1 <= lost:  # only where the prompt's end is wanted
                raise DataError(
                    f"Got text {row + 1} ({text.text[:40]!r}) whose answer alone fills the {limit} "
                    f"tokens of {model.name}, but expected room for the prompt's last token. "
                    "Shorten the answer or choose another position."
                )
            ids = ids[:1] + ids[1 + lost :]
            # The first token stays where it is.
            if end > 1:
                start, end = max(start - lost, 1), end - lost
        spans.append(TokenSpan(TokenIds(ids), start, end))
    return spans, n_cut
