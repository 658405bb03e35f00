"""Forward passes that keep the wanted positions of the wanted blocks, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache

from expertsteer.data import RenderedText
from expertsteer.models import LanguageModel, block_output
from expertsteer.models.batches import padded, position_ids
from expertsteer.states.positions import TokenSpan

__all__ = ["BlockReader", "PromptGroup", "prompt_groups"]

# Below this many shared tokens, a second pass costs more than it saves.
_SHORTEST_PROMPT = 8
# Kinds of layers whose memory of a prompt several answers can go on from.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class PromptGroup:
    """Texts that begin with the same tokens, none of them wanted.

    Attributes
    ----------
    prompt : tuple of int
        The shared tokens.
    spans : tuple of TokenSpan
        The whole texts.
    """

    prompt: tuple[int, ...]
    spans: tuple[TokenSpan, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.prompt) + sum(len(s.ids) - len(self.prompt) for s in self.spans)


def prompt_groups(
    model: LanguageModel,
    texts: Sequence[RenderedText],
    spans: Sequence[TokenSpan],
    wanted: set[TokenSpan],
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
    wanted : set of TokenSpan
        Those that are to be read.

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
        if text.answer_start and span in wanted:
            members.setdefault(text.text[: text.answer_start], {})[span] = None
    groups = []
    for group in members.values():
        # An answer may change the tokens at the seam, so the shared ones are compared.
        shared = _common_beginning([span.ids for span in group])
        shared = shared[: min(span.start for span in group)]
        if len(group) > 1 and len(shared) >= _SHORTEST_PROMPT:
            groups.append(PromptGroup(shared, tuple(group)))
    return groups


def _common_beginning(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
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

    def read(
        self, spans: Sequence[TokenSpan], groups: Sequence[PromptGroup], batch_tokens: int
    ) -> Iterator[tuple[torch.Tensor, list[TokenSpan]]]:
        """Read texts, those of a group together.

        Parameters
        ----------
        spans : sequence of TokenSpan
            All texts, those of the groups too.
        groups : sequence of PromptGroup
        batch_tokens : int
            Most tokens of a batch, padding included.

        Yields
        ------
        states : Tensor of shape (batch, layers, width)
        batch : list of TokenSpan
            The texts they belong to.
        """
        grouped = {span for group in groups for span in group.spans}
        for batch in _batches([s for s in spans if s not in grouped], batch_tokens):
            yield self._read_texts(batch), batch
        for answers in _group_batches(groups, batch_tokens):
            yield self._read_answers(answers), [span for group in answers for span in group.spans]

    def _keep(self, _block: torch.nn.Module, _inputs: object, output: object) -> None:
        hidden = block_output(output)
        self.n_passed += 1
        if self.weights is not None:
            weights = self.weights.to(hidden.device)
            if weights.dtype == torch.long:
                rows = torch.arange(hidden.shape[0], device=hidden.device)
                self.kept.append(hidden[rows, weights])
            else:
                self.kept.append(torch.einsum("bt,btd->bd", weights, hidden.float()))
        if self.n_passed == len(self.layers):
            raise _Finished

    def _want(self, spans: Sequence[tuple[int, int]] | None, longest: int = 0) -> None:
        """Set which tokens of each row the next pass keeps, by start and end; None: none."""
        self.kept, self.n_passed, self.weights = [], 0, None
        if spans is None:
            return
        if all(end - start == 1 for start, end in spans):
            self.weights = torch.tensor([start for start, _ in spans])
            return
        self.weights = torch.zeros(len(spans), longest)
        for row, (start, end) in enumerate(spans):
            self.weights[row, start:end] = 1 / (end - start)

    def _pass(self, **inputs: Any) -> None:
        with contextlib.suppress(_Finished):
            self.model.model(**inputs)

    @torch.inference_mode()
    def _read_texts(self, batch: Sequence[TokenSpan]) -> torch.Tensor:
        # Right padding whatever the tokenizer's habit: a causal model's real tokens
        # never see what follows them, so no mask is needed and the fastest attention
        # kernel serves.
        ids, _ = padded(self.model, [span.ids for span in batch], "right")
        self._want([(span.start, span.end) for span in batch], ids.shape[1])
        self._pass(input_ids=ids, use_cache=False)
        return torch.stack([state.to("cpu") for state in self.kept], dim=1)

    @torch.inference_mode()
    def _read_answers(self, groups: Sequence[PromptGroup]) -> torch.Tensor:
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
        owners = torch.tensor([place for place, _ in answers], device=prompts.device)
        cache.reorder_cache(cast(torch.LongTensor, owners))
        shared = [len(groups[place].prompt) for place, _ in answers]
        tails = [span.ids[n:] for (_, span), n in zip(answers, shared, strict=True)]
        ids, new = padded(self.model, tails, "right")
        whole = torch.cat([mask[owners], new], dim=1)
        self._want(
            [(s.start - n, s.end - n) for (_, s), n in zip(answers, shared, strict=True)],
            ids.shape[1],
        )
        self._pass(
            input_ids=ids,
            attention_mask=whole,
            past_key_values=cache,
            use_cache=True,
            **position_ids(self.model, whole, ids.shape[1]),
        )
        return torch.stack([state.to("cpu") for state in self.kept], dim=1)


def _batches(spans: Sequence[TokenSpan], batch_tokens: int) -> Iterator[list[TokenSpan]]:
    """Group texts of similar length, longest first so that memory peaks at once."""
    batch: list[TokenSpan] = []
    for span in sorted(spans, key=lambda s: len(s.ids), reverse=True):
        if batch and _is_full(batch, span, batch_tokens):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


def _group_batches(groups: Sequence[PromptGroup], batch_tokens: int) -> Iterator[list[PromptGroup]]:
    """Group prompts of similar length, longest first; their answers count as well."""
    batch: list[PromptGroup] = []
    n_tails = 0
    for group in sorted(groups, key=lambda g: len(g.prompt), reverse=True):
        tails = group.n_tokens - len(group.prompt)
        if batch and (len(batch) + 1) * len(batch[0].prompt) + n_tails + tails > batch_tokens:
            yield batch
            batch, n_tails = [], 0
        batch.append(group)
        n_tails += tails
    if batch:
        yield batch


def _is_full(batch: Sequence[TokenSpan], following: TokenSpan, batch_tokens: int) -> bool:
    """Return whether the next text, no longer than the batch's first, has no place in it."""
    longest = len(batch[0].ids)
    # From a quarter on, padding a shorter text costs more than another batch.
    padded = len(following.ids) < longest and 4 * len(batch) * longest >= batch_tokens
    return padded or (len(batch) + 1) * longest > batch_tokens
