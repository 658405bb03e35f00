"""Token ids as padded batches, and where their tokens stand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import Cache

from expertsteer.models.loading import LanguageModel

__all__ = [
    "BATCH_TOKENS",
    "CONTINUATION_TOKENS",
    "HEAD_POSITIONS",
    "HostCopy",
    "continuation_batches",
    "padded",
    "position_ids",
    "real_places",
    "to_device",
    "token_batches",
]

BATCH_TOKENS = 2048
# Continuations have few tokens each, and padding them multiplies these.
CONTINUATION_TOKENS = 512
# The output head writes positions x vocabulary numbers: 512 x 262,144 in float32 are 537 MB.
HEAD_POSITIONS = 512


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; a GPU takes it without the CPU waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


class HostCopy:
    """States of several blocks on their way to the CPU.

    From a GPU they go to pinned memory behind what it still computes, so that only `wait`
    waits for it.

    Parameters
    ----------
    states : sequence of Tensor of shape (batch, width)
        A block each, on any devices.
    """

    def __init__(self, states: Sequence[torch.Tensor]) -> None:
        on_gpu = any(state.is_cuda for state in states)
        first = states[0]
        self._host = torch.empty((len(states), *first.shape), dtype=first.dtype, pin_memory=on_gpu)
        for place, state in enumerate(states):
            self._host[place].copy_(state, non_blocking=True)
        self._events: list[torch.cuda.Event] = []
        for device in {state.device for state in states if state.is_cuda}:
            with torch.cuda.device(device):
                event = torch.cuda.Event()
                event.record()
                self._events.append(event)

    @property
    def is_under_way(self) -> bool:
        """Whether a GPU has yet to send them."""
        return bool(self._events)

    def wait(self) -> torch.Tensor:
        """Return the states as (batch, blocks, width) on the CPU, when they are there."""
        for event in self._events:
            event.synchronize()
        return self._host.transpose(0, 1)


def token_batches(
    lengths: Sequence[int],
    batch_tokens: int = BATCH_TOKENS,
    *,
    head_positions: Sequence[int] | None = None,
    mix_lengths: bool = False,
) -> Iterator[list[int]]:
    """Yield rows of similar length together, longest first so that memory peaks at once.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of every row.
    batch_tokens : int, default=2048
        Most tokens of a batch, padding counted.
    head_positions : sequence of int, optional
        How many tokens of a row reach the output head; a batch has 512 of them at most.
    mix_lengths : bool, default=False
        Whether a batch takes shorter rows until it is full. Otherwise only until it is a
        quarter full: from there on, padding them costs more than another batch.

    Yields
    ------
    list of int
        Places of rows.
    """
    heads = head_positions or [0] * len(lengths)
    batch: list[int] = []
    positions = longest = 0
    for row in sorted(range(len(lengths)), key=lambda r: lengths[r], reverse=True):
        positions += heads[row]
        pads_too_much = lengths[row] < longest and 4 * len(batch) * longest >= batch_tokens
        if batch and (
            positions > HEAD_POSITIONS
            or (len(batch) + 1) * longest > batch_tokens
            or (pads_too_much and not mix_lengths)
        ):
            yield batch
            batch, positions = [], heads[row]
        if not batch:
            longest = lengths[row]
        batch.append(row)
    if batch:
        yield batch


def padded(
    model: LanguageModel, ids: Sequence[Sequence[int]], side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and their mask, both (batch, tokens), on the model's device."""
    longest = max(len(row) for row in ids)
    batch = torch.full((len(ids), longest), model.pad_token_id)
    mask = torch.zeros_like(batch)
    for place, row in enumerate(ids):
        real = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        batch[place, real] = torch.tensor(list(row))
        mask[place, real] = 1
    return to_device(batch, model.device), to_device(mask, model.device)


def real_places(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows and columns of the tokens of a batch that is padded to the right.

    Counted on the CPU: asked of a mask on a GPU, the CPU would wait for all it was given.
    """
    counts = torch.tensor(lengths)
    columns = torch.cat([torch.arange(length) for length in lengths])
    return torch.arange(len(lengths)).repeat_interleave(counts), columns


def continuation_batches(
    model: LanguageModel,
    cache: Cache,
    mask: torch.Tensor,
    owners: Sequence[int],
    continuations: Sequence[Sequence[int]],
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield what continues read contexts, in batches of similar length.

    Parameters
    ----------
    model : LanguageModel
    cache : Cache
        What was read, a row a context; used up by the last batch.
    mask : Tensor of shape (n_contexts, n_tokens)
        Of the contexts, padded to the left.
    owners : sequence of n int
        The context of each continuation.
    continuations : sequence of n sequences of int
        Their tokens, at least one each.

    Yields
    ------
    rows : list of int
        Places of the continuations.
    inputs : dict
        Of the model's pass, with the continuations padded to the right.
    """
    lengths = [len(tokens) for tokens in continuations]
    batches = list(token_batches(lengths, CONTINUATION_TOKENS))
    for rows in batches:
        # Choosing rows changes a cache, and the batches that follow need it as it was.
        read = cache if rows is batches[-1] else copy.deepcopy(cache)
        chosen = to_device(torch.tensor([owners[row] for row in rows]), mask.device)
        read.reorder_cache(cast(torch.LongTensor, chosen))
        ids, new = padded(model, [continuations[row] for row in rows], "right")
        whole = torch.cat([mask[chosen], new], dim=1)
        inputs = {"input_ids": ids, "attention_mask": whole, "past_key_values": read}
        yield rows, inputs | position_ids(model, whole, ids.shape[1])


def position_ids(
    model: LanguageModel, mask: torch.Tensor, newest: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the position ids of the newest tokens where the model takes any."""
    if "position_ids" not in inspect.signature(model.model.forward).parameters:
        return {}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"position_ids": positions if newest is None else positions[:, -newest:]}
