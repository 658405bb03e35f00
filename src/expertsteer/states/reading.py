"""Forward passes that keep the wanted positions of the wanted blocks, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from expertsteer.data import RenderedText
from expertsteer.models import LanguageModel, block_output
from expertsteer.models.batches import (
    HostCopy,
    continuation_batches,
    padded,
    position_ids,
    to_device,
    token_batches,
)
from expertsteer.states.positions import TokenIds, TokenSpan

__all__ = [
    "Batch",
    "BlockReader",
    "PromptGroup",
    "TextGroup",
    "plan_batches",
    "prompt_groups",
    "text_groups",
]

# Below this many shared tokens, a second pass costs more than it saves.
_SHORTEST_PROMPT = 8
# Kinds of layers whose memory of a prompt several answers can go on from.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Texts that begin with the same tokens, none of them wanted.

    Attributes
    ----------
    prompt : TokenIds
        The shared tokens.
    spans : tuple of TokenSpan
        The whole texts.
    """

    prompt: TokenIds
    spans: tuple[TokenSpan, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.prompt) + sum(len(s.ids) - len(self.prompt) for s in self.spans)


@dataclass(frozen=True, slots=True)
class TextGroup:
    """A text, and those that are beginnings of it: what follows a token never changes its state.

    Attributes
    ----------
    ids : TokenIds
        The longest one's tokens.
    spans : tuple of TokenSpan
        All of them.
    """

    ids: TokenIds
    spans: tuple[TokenSpan, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that pass through the model together.

    Attributes
    ----------
    spans : tuple of TokenSpan
        The texts.
    groups : tuple of PromptGroup
        Where they are answers to shared prompts: the groups they come from, in order.
    whole : tuple of TextGroup
        Where they are not: the texts that are read, of which others are the beginnings.
    """

    spans: tuple[TokenSpan, ...]
    groups: tuple[PromptGroup, ...] = ()
    whole: tuple[TextGroup, ...] = ()

    @classmethod
    def of_groups(cls, groups: Sequence[PromptGroup]) -> Batch:
        """Return the batch of all texts of some groups."""
        return cls(tuple(span for group in groups for span in group.spans), groups=tuple(groups))

    @classmethod
    def of_texts(cls, whole: Sequence[TextGroup]) -> Batch:
        """Return the batch of some texts and their beginnings."""
        return cls(tuple(span for group in whole for span in group.spans), whole=tuple(whole))

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return sum(group.n_tokens for group in (*self.groups, *self.whole))


def prompt_groups(
    model: LanguageModel,
    texts: Sequence[RenderedText],
    spans: Sequence[TokenSpan],
) -> list[PromptGroup]:
    """Return the groups of answers to one prompt that are worth reading together.

    Parameters
    ----------
    model : LanguageModel
        Its layers decide whether it can go on from a prompt in several ways.
    texts : sequence of RenderedText
        The texts; what stands before the answer is the prompt.
    spans : sequence of TokenSpan
        Their tokens.

    Returns
    -------
    list of PromptGroup
        Each of two texts or more.
    """
    config = model.model.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or _ATTENTION) <= _ATTENTION or getattr(
        model.model, "_is_stateful", False
    ):
        return []
    members: dict[str, dict[TokenSpan, None]] = {}
    for text, span in zip(texts, spans, strict=True):
        if text.answer_start:
            members.setdefault(text.text[: text.answer_start], {})[span] = None
    groups = []
    for group in members.values():
        # An answer may change the tokens at the seam, so the shared ones are compared.
        shared = _common_beginning([span.ids for span in group])
        shared = shared[: min(span.start for span in group)]
        if len(group) > 1 and len(shared) >= _SHORTEST_PROMPT:
            groups.append(PromptGroup(shared, tuple(group)))
    return groups


def text_groups(spans: Sequence[TokenSpan]) -> list[TextGroup]:
    """Return the texts that are no beginning of another, each with its beginnings.

    Parameters
    ----------
    spans : sequence of TokenSpan
        Distinct. Those whose states are means over tokens stand alone.

    Returns
    -------
    list of TextGroup
        In the order of the longest ones.
    """
    if any(span.end - span.start > 1 for span in spans):
        return [TextGroup(span.ids, (span,)) for span in spans]
    members: dict[TokenIds, list[TokenSpan]] = {}
    longest = TokenIds(())
    # In the order of their tokens, a text stands right before those it is the beginning of.
    for span in sorted(spans, reverse=True):
        if not longest.starts_with(span.ids):
            longest = span.ids
        members.setdefault(longest, []).append(span)
    ordered = [span.ids for span in spans if span.ids in members]
    return [TextGroup(ids, tuple(members[ids])) for ids in dict.fromkeys(ordered)]


def _common_beginning(sequences: Sequence[TokenIds]) -> TokenIds:
    # What the first and the last in order share, all share.
    first, last = min(sequences), max(sequences)
    same = (a == b for a, b in zip(first, last, strict=False))
    return first[: next((n for n, equal in enumerate(same) if not equal), len(first))]


class _Finished(Exception):  # noqa: N818 - not an error: it ends the pass early
    """The last wanted block has been read."""


class BlockReader:
    """Hooks that keep the wanted positions of the wanted blocks.

    Parameters
    ----------
    model : LanguageModel
        The model to read.
    layers : tuple of int
        0-based blocks, ascending; a pass ends behind the last.
    """

    def __init__(self, model: LanguageModel, layers: tuple[int, ...]) -> None:
        self.model = model
        self.layers = layers
        self.weights: torch.Tensor | None = None
        self.kept: list[torch.Tensor] = []
        self.n_passed = 0
        self.handles: list[Any] = []

    def __enter__(self) -> BlockReader:
        for layer in self.layers:
            hook = self.model.blocks[layer].register_forward_hook(self._keep)
            self.handles.append(hook)
        return self

    def __exit__(self, *details: object) -> None:
        for handle in self.handles:
            handle.remove()

    def read(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Read batches.

        Parameters
        ----------
        batches : iterable of Batch

        Yields
        ------
        batch : Batch
        states : Tensor of shape (batch, layers, width)
            On the CPU, a row for each of its ``spans``.
        """
        before: tuple[Batch, HostCopy] | None = None
        for batch in batches:
            copy = HostCopy(self._read_answers(batch) if batch.groups else self._read_texts(batch))
            if before is not None:
                # The GPU computes this batch while the one before is taken.
                yield before[0], before[1].wait()
            before = (batch, copy) if copy.is_under_way else None
            if before is None:
                yield batch, copy.wait()
        if before is not None:
            yield before[0], before[1].wait()

    def _keep(self, _block: torch.nn.Module, _inputs: object, output: object) -> None:
        hidden = block_output(output)
        self.n_passed += 1
        if self.weights is not None:
            weights = self._weights_on(hidden.device)
            if weights.dtype == torch.long:
                rows, places = weights
                self.kept.append(hidden[rows, places])
            else:
                self.kept.append(torch.einsum("bt,btd->bd", weights, hidden.float()))
        if self.n_passed == len(self.layers):
            raise _Finished

    def _weights_on(self, device: torch.device) -> torch.Tensor:
        if self.weights is not None and self.weights.device != device:
            self.weights = to_device(self.weights, device)
        assert self.weights is not None
        return self.weights

    def _want(self, spans: Sequence[tuple[int, int, int]] | None, longest: int = 0) -> None:
        """Set which tokens the next pass keeps, by row, start and end; None: none.

        More than one token of a row, of which the mean is kept, once a row and in their order.
        """
        self.kept, self.n_passed, self.weights = [], 0, None
        if spans is None:
            return
        if all(end - start == 1 for _, start, end in spans):
            self.weights = torch.tensor([[row for row, _, _ in spans], [s for _, s, _ in spans]])
            return
        self.weights = torch.zeros(len(spans), longest)
        for row, start, end in spans:
            self.weights[row, start:end] = 1 / (end - start)

    def _pass(self, **inputs: Any) -> None:
        with contextlib.suppress(_Finished):
            self.model.model(**inputs)

    @torch.inference_mode()
    def _read_texts(self, batch: Batch) -> list[torch.Tensor]:
        # Right padding whatever the tokenizer's habit: a causal model's real tokens
        # never see what follows them, so no mask is needed and the fastest attention
        # kernel serves.
        ids, _ = padded(self.model, [group.ids for group in batch.whole], "right")
        self._want(
            [(row, s.start, s.end) for row, group in enumerate(batch.whole) for s in group.spans],
            ids.shape[1],
        )
        self._pass(input_ids=ids, use_cache=False)
        return self.kept

    @torch.inference_mode()
    def _read_answers(self, batch: Batch) -> list[torch.Tensor]:
        groups = batch.groups
        # Padding to the left keeps distances between prompt and answer as they are.
        prompts, mask = padded(self.model, [group.prompt for group in groups], "left")
        cache = DynamicCache(config=self.model.model.config)
        self._want(None)
        self._pass(
            input_ids=prompts,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **position_ids(self.model, mask),
        )
        answers = [(place, span) for place, group in enumerate(groups) for span in group.spans]
        tails = [span.ids[len(groups[place].prompt) :] for place, span in answers]
        found: list[list[torch.Tensor]] = []
        order: list[int] = []
        owners = [place for place, _ in answers]
        for rows, inputs in continuation_batches(self.model, cache, mask, owners, tails):
            wanted = []
            for place, (owner, span) in enumerate(answers[row] for row in rows):
                n = len(groups[owner].prompt)
                wanted.append((place, span.start - n, span.end - n))
            self._want(wanted, inputs["input_ids"].shape[1])
            self._pass(**inputs, use_cache=True)
            found.append(self.kept)
            order += rows
        back = torch.tensor(order).argsort()
        return [
            torch.cat(states)[to_device(back, states[0].device)]
            for states in zip(*found, strict=True)
        ]


def plan_batches(
    spans: Sequence[TokenSpan], groups: Sequence[PromptGroup], batch_tokens: int
) -> list[Batch]:
    """Put texts of similar length together, those of a group into one batch.

    What shares a batch decides the last bits of a state, so it depends on nothing else
    than the texts.

    Parameters
    ----------
    spans : sequence of TokenSpan
        All texts, those of the groups too.
    groups : sequence of PromptGroup
    batch_tokens : int
        Most tokens of a batch's texts, or of the prompts of its groups, padding included.

    Returns
    -------
    list of Batch
        Longest first, so that memory peaks at once.
    """
    grouped = {span for group in groups for span in group.spans}
    whole = text_groups([span for span in spans if span not in grouped])
    texts = token_batches([len(group.ids) for group in whole], batch_tokens)
    prompts = token_batches([len(group.prompt) for group in groups], batch_tokens)
    return [
        *(Batch.of_texts([whole[place] for place in places]) for places in texts),
        *(Batch.of_groups([groups[place] for place in places]) for places in prompts),
    ]
