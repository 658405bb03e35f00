"""Read texts again and again under steerings that differ, the blocks below them only once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from expertsteer.models import LanguageModel, replaced_forward
from expertsteer.steering import Steering

__all__ = ["LowerBlocks"]


class LowerBlocks:
    """Remembers what a model's blocks return up to the lowest steered one.

    A steering changes nothing up to the block it is added behind, so a text that is read
    under many strengths needs those blocks once. What is remembered is the block's own
    output, bit for bit; the memory it takes grows with the texts.

    Parameters
    ----------
    model : LanguageModel

    Notes
    -----
    Source: this project. Passes that fill or use a key-value cache run whole, since later
    passes ask for every block's keys.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._outputs: dict[tuple[int, bytes, bytes], Any] = {}

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
        return self._skipped_to(min(steering.vectors))

    @contextmanager
    def remembered(self, layers: Iterable[int]) -> Iterator[None]:
        """Remember what unsteered passes give, for steerings whose lowest layer is one of these.

        Parameters
        ----------
        layers : iterable of int
        """
        with ExitStack() as stack:
            running = self._watched(stack)

            def keep(layer: int, _block: nn.Module, _args: Any, output: Any) -> None:
                if running.key is not None:
                    self._outputs[(layer, *running.key)] = output

            for layer in layers:
                hook = self.model.blocks[layer].register_forward_hook(partial(keep, layer))
                stack.callback(hook.remove)
            yield

    def _watched(self, stack: ExitStack) -> _Pass:
        """Return what knows, until the stack is left, which pass the decoder is in."""
        running = _Pass()

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            running.key = _key(given | given.get("kwargs", {}))

        decoder = self.model.model.get_decoder()
        stack.callback(decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
        return running

    @contextmanager
    def _skipped_to(self, layer: int) -> Iterator[None]:
        def forward(place: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if running.key is None:
                    return original(*args, **kwargs)
                key = (layer, *running.key)
                if key in self._outputs:
                    # Blocks hand on what they are given; the last one returns the same again.
                    return self._outputs[key]
                output = original(*args, **kwargs)
                if place == layer:
                    self._outputs[key] = output
                return output

            return run

        with ExitStack() as stack:
            running = self._watched(stack)
            for place, block in enumerate(self.model.blocks[: layer + 1]):
                stack.enter_context(replaced_forward(block, forward(place, block.forward)))
            yield


class _Pass:
    """A pass through the decoder; its key is None where blocks may not be skipped."""

    key: tuple[bytes, bytes] | None = None


def _key(options: dict[str, Any]) -> tuple[bytes, bytes] | None:
    """Return what tells a pass with these options of the decoder from others, or None."""
    ids, mask = options.get("input_ids"), options.get("attention_mask")
    if ids is None or options.get("use_cache") is not False:
        return None
    if options.get("past_key_values") is not None:
        return None
    if mask is not None and not isinstance(mask, torch.Tensor):
        return None
    return _bytes(ids), b"" if mask is None else _bytes(mask)


def _bytes(tensor: torch.Tensor) -> bytes:
    # Rows of another length would have the same bytes.
    return repr(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes()
