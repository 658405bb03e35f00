"""Step 4: add vectors to the residual stream behind chosen blocks."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import Self

from expertsteer.errors import ModelError, ParameterError
from expertsteer.models import block_output, check_layers, find_blocks, unwrap
from expertsteer.steering.positions import STEERED_POSITIONS, PositionTracker

__all__ = ["Steering", "check_strength"]


def check_strength(strength: float) -> float:
    """Return a steering strength as a float.

    Raises
    ------
    ParameterError
        If it is zero or not finite.
    """
    value = float(strength)
    if not math.isfinite(value):
        raise ParameterError(f"Got strength={value}, but expected a finite number.")
    if value == 0:
        raise ParameterError(
            "Got strength=0, but expected another number. To generate unsteered, use the model "
            "without a pack."
        )
    return value


class Steering:
    r"""Adds one vector a layer to the residual stream: h ← h + v.

    Use it as a context manager, or call `attach` and `detach`. The model's weights are
    never touched; whatever runs the model meanwhile (generation of any kind, the
    trainer, a pipeline, an evaluation harness) runs steered.

    Parameters
    ----------
    model : PreTrainedModel
        The target, wrapped by torch.compile or peft or not.
    vectors : mapping of int to Tensor of shape (width,)
        What to add behind each 0-based block, already scaled.
    positions : {"all", "prompt", "generated", "last"}, default="all"
        Which tokens: every one, those of the prompt, the generated ones, or the newest
        (the prompt's last, then each generated one). Correct with a key-value cache,
        padding on either side, batches, beams and assisted decoding.

    Raises
    ------
    ParameterError
        On unknown positions or vectors that are not finite.
    ModelError
        On a layer or width the model does not have.

    Notes
    -----
    Source: ExpertSteer (arXiv 2505.12313), step 4.
    """

    def __init__(
        self, model: Any, vectors: Mapping[int, torch.Tensor], positions: str = "all"
    ) -> None:
        if positions not in STEERED_POSITIONS:
            raise ParameterError(
                f"Got positions={positions!r}, but expected one of {', '.join(STEERED_POSITIONS)}."
            )
        self.blocks = find_blocks(model)
        self.model = unwrap(model)
        self.positions = positions
        width = self.model.config.get_text_config().hidden_size
        for layer in check_layers(vectors, len(self.blocks), type(self.model).__name__):
            vector = vectors[layer]
            if vector.shape != (width,):
                raise ModelError(
                    f"Got a vector of shape {tuple(vector.shape)} for layer {layer}, but expected "
                    f"({width},), the width of {type(self.model).__name__}."
                )
            if not bool(torch.isfinite(vector).all()):
                raise ParameterError(f"Got a vector with NaN or infinity for layer {layer}.")
        self.vectors = dict(vectors)
        self._tracker: PositionTracker | None = None
        self._handles: list[Any] = []

    def attach(self) -> Self:
        """Start steering.

        Raises
        ------
        ModelError
            If this steering is attached already.
        """
        if self._handles:
            raise ModelError("Got attach() on a steering that is attached already.")
        if self.positions != "all":
            self._tracker = _tracker_of(self.model)
        for layer, vector in self.vectors.items():
            hook = functools.partial(self._add, vector=_Placed(vector))
            self._handles.append(self.blocks[layer].register_forward_hook(hook))
        _forget_compiled_code()
        return self

    def detach(self) -> None:
        """Stop steering; harmless when not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._tracker is not None:
            _release_tracker(self.model)
            self._tracker = None
        _forget_compiled_code()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *details: object) -> None:
        self.detach()

    def _add(
        self, _block: nn.Module, _inputs: Any, output: Any, *, vector: _Placed
    ) -> torch.Tensor | tuple[Any, ...]:
        hidden = block_output(output)
        added = vector.near(hidden)
        if self._tracker is not None:
            # Adding -0.0 keeps every bit of an unsteered token, and a sum, unlike a choice
            # between two tensors, leaves nothing for a backward pass to recompute.
            mask = self._tracker.mask(self.positions, hidden)
            added = torch.where(mask[..., None], added, -0.0)
        steered = hidden + added
        return (steered, *output[1:]) if isinstance(output, tuple) else steered


# Under which names decoders take what they remember of earlier passes.
_CACHES = ("past_key_values", "cache_params")


class _Placed:
    """A vector that follows its block to the device and float type of the states."""

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector.detach()

    def near(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.vector.device != hidden.device or self.vector.dtype != hidden.dtype:
            self.vector = self.vector.to(hidden.device, hidden.dtype)
        return self.vector


class _Watch:
    """One tracker a model, shared by all steerings attached to it."""

    def __init__(self, model: Any) -> None:
        self.tracker = PositionTracker()
        self.users = 0
        # The decoder is reached whoever calls it: generate, a pipeline, a wrapper.
        self.handle = model.get_decoder().register_forward_pre_hook(
            self._before_pass, with_kwargs=True
        )
        self.model = model
        self.shadowed = vars(model).get("generate")
        self.generate = getattr(model, "generate", None)
        if self.generate is None:  # a classifier on a decoder, for example
            return

        @functools.wraps(self.generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return self._generate(*args, **kwargs)

        # An instance attribute shadows the method and leaves the class alone.
        model.generate = generate

    def _before_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if len(args) > 1:
            kwargs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        assert inputs is not None  # a decoder that got neither has raised by itself
        self.tracker.begin_pass(
            inputs.shape[1],
            next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None),
            kwargs.get("attention_mask"),
            inputs.device,
        )

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        inputs = kwargs.get("inputs_embeds")
        for name in ("inputs", "input_ids"):
            inputs = kwargs.get(name) if inputs is None else inputs
        if inputs is None and args:
            inputs = args[0]
        # Without any input, generate starts from the beginning-of-text token.
        length = inputs.shape[1] if inputs is not None else 1
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            # Where a cache is continued with the new tokens alone, the mask tells of all.
            length = max(length, mask.shape[1])
        self.tracker.begin_generation(length)
        try:
            return cast(Any, self.generate)(*args, **kwargs)
        finally:
            self.tracker.end_generation()

    def remove(self) -> None:
        self.handle.remove()
        vars(self.model).pop("generate", None)
        if self.shadowed is not None:
            self.model.generate = self.shadowed


# On the model itself: they go when it goes.
_WATCH = "_expertsteer_watch"


def _tracker_of(model: Any) -> PositionTracker:
    watch = vars(model).get(_WATCH)
    if watch is None:
        watch = vars(model)[_WATCH] = _Watch(model)
    watch.users += 1
    return watch.tracker


def _release_tracker(model: Any) -> None:
    watch = vars(model)[_WATCH]
    watch.users -= 1
    if watch.users == 0:
        watch.remove()
        del vars(model)[_WATCH]


def _forget_compiled_code() -> None:
    # torch.compile does not notice hooks that come or go after compilation; without
    # this, a compiled model would silently go on as it was.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["ok"]:
        dynamo.reset()
