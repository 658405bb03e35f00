"""Read texts again and again under steerings that differ, the blocks below them only once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from expertsteer.models import LanguageModel, replaced_forward
from expertsteer.steering import Steering

__all__ = ["LowerBlocks"]

_Key = tuple[int, bytes, bytes]


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
        self._outputs: dict[_Key, Any] = {}

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
    def _skipped_to(self, layer: int) -> Iterator[None]:
        decoder = self.model.model.get_decoder()
        key: _Key | None = None

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal key
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            options = given | given.get("kwargs", {})
            key = _key(layer, options)

        def forward(place: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if key is None:
                    return original(*args, **kwargs)
                if key in self._outputs:
                    # Blocks hand on what they are given; the last one returns the same again.
                    return self._outputs[key]
                output = original(*args, **kwargs)
                if place == layer:
                    self._outputs[key] = output
                return output

            return run

        with ExitStack() as stack:
            stack.callback(decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for place, block in enumerate(self.model.blocks[: layer + 1]):
                stack.enter_context(replaced_forward(block, forward(place, block.forward)))
            yield


def _key(layer: int, options: dict[str, Any]) -> _Key | None:
    """Return what tells a pass from others, or None where blocks may not be skipped."""
    ids, mask = options.get("input_ids"), options.get("attention_mask")
    if ids is None or options.get("use_cache") is not False:
        return None
    if options.get("past_key_values") is not None:
        return None
    if mask is not None and not isinstance(mask, torch.Tensor):
        return None
    return layer, _bytes(ids), b"" if mask is None else _bytes(mask)


def _bytes(tensor: torch.Tensor) -> bytes:
    # Rows of another length would have the same bytes.
    return repr(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes()
