"""Read texts again and again under steerings that differ, the blocks below them only once."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from expertsteer.models import LanguageModel, replaced_forward, seconds_of_work
from expertsteer.steering import Steering

__all__ = ["LowerBlocks"]


class LowerBlocks:
    """Remembers what a model's blocks return up to the lowest steered one.

    A steering changes nothing up to the block it is added behind, so a text that is read
    under many steerings needs those blocks once. What is remembered is the block's own
    output and the keys and values it added to a cache, bit for bit; the memory it takes
    grows with the texts.

    Parameters
    ----------
    model : LanguageModel

    Attributes
    ----------
    seconds_skipped : float
        What the blocks that were skipped so far took when they were read.

    Notes
    -----
    Source: this project. Passes whose cache is more than keys and values (recurrent states,
    states shared between blocks) run whole.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._remembered: dict[tuple[int, bytes], _Remembered] = {}
        self.seconds_skipped = 0.0

    def skipped(self, steering: AbstractContextManager[Any]) -> AbstractContextManager[None]:
        """Return a context manager under which remembered blocks are skipped.

        Parameters
        ----------
        steering : context manager
            Whose lowest layer decides. Anything but a `Steering`, such as an adapter, may
            change every block: then none is skipped.
        """
        if not isinstance(steering, Steering):
            return nullcontext()
        return self.remembered([min(steering.vectors)])

    def shared(self, steerings: Mapping[float, Steering | None]) -> AbstractContextManager[None]:
        """Return a context manager under which passes of any of these steerings share blocks.

        Parameters
        ----------
        steerings : mapping of float to Steering or None
            By strength; of one pack, so that all have the same lowest layer.
        """
        layers = [min(steering.vectors) for steering in steerings.values() if steering]
        return self.remembered([min(layers)]) if len(steerings) > 1 else nullcontext()

    @contextmanager
    def remembered(self, layers: Iterable[int]) -> Iterator[None]:
        """Remember what passes give that nothing steers below or at these layers.

        Parameters
        ----------
        layers : iterable of int
            The lowest layers of the steerings to come.
        """
        chosen = sorted(layers)
        with ExitStack() as stack:
            running = _Pass()

            def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._begin(running, chosen, _options(module.forward, args, kwargs))

            decoder = self.model.model.get_decoder()
            stack.callback(decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for place, block in enumerate(self.model.blocks[: chosen[-1] + 1]):
                forward = self._forward(running, place, block.forward)
                stack.enter_context(replaced_forward(block, forward))
            yield

    def _begin(self, running: _Pass, layers: list[int], options: dict[str, Any]) -> None:
        """Find out what is known of a pass; of several layers, all or none."""
        keys = {layer: _key(options, layer) for layer in layers}
        running.keys = {layer: key for layer, key in keys.items() if key is not None}
        found = [self._remembered.get(item) for item in running.keys.items()]
        running.known = found[-1] if found and None not in found else None
        running.fills_cache = options.get("use_cache") is not False
        running.updates = []
        if running.known is not None:
            self.seconds_skipped += running.known.seconds
        elif running.keys:
            # A GPU is waited for, so only where there is something to be remembered.
            running.started = seconds_of_work(self.model)

    def _forward(
        self, running: _Pass, place: int, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not running.keys:
                return original(*args, **kwargs)
            options = _options(original, args, kwargs)
            cache = _cache_in(options)
            if running.known is not None:
                if cache is not None:
                    for update in running.known.updates[place]:
                        cache.update(*update.args, **update.kwargs)
                # Blocks hand on what they are given; the last one returns the same again.
                return running.known.output
            with _recorded(cache) as updates:
                output = original(*args, **kwargs)
            running.updates.append(updates)
            if cache is None:
                keeps_more = running.fills_cache
            else:
                keeps_more = _attention_cache(cache, place) is None
            if keeps_more or options.get("shared_kv_states") is not None:
                running.keys = {}
            key = running.keys.get(place)
            if key is not None:
                seconds = seconds_of_work(self.model) - running.started
                new = _Remembered(output, list(running.updates), seconds)
                self._remembered[(place, key)] = new
            return output

        return forward


class _Update(NamedTuple):
    """What a block gave to a cache."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Remembered:
    """What the blocks up to one gave and took: output, updates of the cache by block, seconds."""

    output: Any
    updates: list[list[_Update]]
    seconds: float


@dataclass
class _Pass:
    """A pass through the decoder: what it may be remembered by, and what is known of it."""

    keys: dict[int, bytes] = field(default_factory=dict)
    known: _Remembered | None = None
    fills_cache: bool = True
    updates: list[list[_Update]] = field(default_factory=list)
    started: float = 0.0


def _options(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return what a forward function is given, by name."""
    given = inspect.signature(forward).bind(*args, **kwargs).arguments
    return given | given.get("kwargs", {})


@contextmanager
def _recorded(cache: Any) -> Iterator[list[_Update]]:
    """Keep what a cache is updated with."""
    updates: list[_Update] = []
    if cache is None:
        yield updates
        return
    update = cache.update

    def keep(*args: Any, **kwargs: Any) -> Any:
        updates.append(_Update(args, kwargs))
        return update(*args, **kwargs)

    cache.update = keep
    try:
        yield updates
    finally:
        del cache.update


def _cache_in(options: dict[str, Any]) -> Cache | None:
    # Families call it by several names.
    return next((value for value in options.values() if isinstance(value, Cache)), None)


def _attention_cache(cache: Cache, place: int) -> DynamicLayer | None:
    """Return what a block's attention keeps, where that is what it was given and no more."""
    layer = cache.layers[place] if type(cache) is DynamicCache else None
    is_plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    return cast(DynamicLayer, layer) if is_plain else None


def _key(options: dict[str, Any], layer: int) -> bytes | None:
    """Return what tells a pass with these options of the decoder from others, or None.

    Of a cache it is what the blocks up to the layer have put there.
    """
    ids, mask = options.get("input_ids"), options.get("attention_mask")
    cache = _cache_in(options)
    if ids is None or not (mask is None or isinstance(mask, torch.Tensor)):
        return None
    digest = hashlib.blake2b(repr(options.get("use_cache")).encode())
    tensors = [ids, mask, options.get("position_ids")]
    if cache is not None and cache.get_seq_length():
        if ids.shape[1] == 1:
            # A token that was just generated: other steerings write other texts.
            return None
        for place in range(layer + 1):
            kept = _attention_cache(cache, place)
            if kept is None:
                return None
            tensors += [kept.keys, kept.values]
    for tensor in tensors:
        # Rows of another length would have the same bytes.
        digest.update(repr(None if tensor is None else tuple(tensor.shape)).encode())
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy())
    return digest.digest()
