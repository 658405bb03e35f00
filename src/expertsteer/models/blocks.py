"""Find a model's decoder blocks by structure, never by its family's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from expertsteer.errors import ModelError

__all__ = [
    "block_output",
    "check_layers",
    "find_blocks",
    "replaced_forward",
    "residual_width",
    "unwrap",
]


def refuse_encoders(model: PreTrainedModel) -> None:
    """Raise for models that read text in both directions.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.

    Raises
    ------
    ModelError
        For encoder-only and encoder-decoder models.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"Got the encoder-decoder model {config.model_type!r}, but expected a decoder-only "
            "language model. Choose one such as GPT-2, Llama, Qwen or Gemma."
        )
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"Got the encoder-only model {config.model_type!r}, but expected a decoder-only "
            "language model. Choose one such as GPT-2, Llama, Qwen or Gemma."
        )


def unwrap(model: Any) -> PreTrainedModel:
    """Return the transformers model inside torch.compile's and peft's wrappers.

    Raises
    ------
    ModelError
        If there is none.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()  # peft's wrapper
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"Got a {type(model).__name__}, but expected a transformers language model. Pass what "
            "AutoModelForCausalLM.from_pretrained returns."
        )
    return inner


def find_blocks(model: Any) -> nn.ModuleList:
    """Return the list of decoder blocks of a causal language model.

    The blocks are the outermost ``ModuleList`` of the text decoder whose length is
    the number of hidden layers in the configuration. Nothing else is assumed, so a
    family nobody has heard of yet works as well.

    Parameters
    ----------
    model : Module
        A transformers model, wrapped or compiled or not.

    Returns
    -------
    ModuleList
        The blocks, first to last.

    Raises
    ------
    ModelError
        For encoders and for models without such a list.
    """
    inner = unwrap(model)
    refuse_encoders(inner)
    n_layers = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    # In a vision-language model an image tower may have as many layers as the text decoder.
    decoder = inner.get_decoder()
    names: list[str] = []
    found: list[nn.ModuleList] = []
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != n_layers:
            continue
        if any(name.startswith(outer + ".") for outer in names):
            continue  # experts or heads inside a block that happen to be as many
        names.append(name)
        found.append(module)
    if len(found) != 1:
        raise ModelError(
            f"Got {type(inner).__name__} with {len(found)} lists of {n_layers} blocks, but "
            "expected exactly one list of decoder blocks. This architecture cannot be steered yet."
        )
    return found[0]


def residual_width(model: PreTrainedModel) -> int:
    """Return the width of the residual stream between the blocks."""
    return int(model.config.get_text_config().hidden_size)


def block_output(output: object) -> torch.Tensor:
    """Return the residual stream in what a block returned.

    Recent transformers blocks return a plain tensor, older ones a tuple that starts
    with it; indexing a tensor with ``[0]`` would silently take the first batch row.

    Parameters
    ----------
    output : Tensor or tuple
        What the block's forward returned.

    Returns
    -------
    Tensor of shape (batch, tokens, width)

    Raises
    ------
    ModelError
        For anything else.
    """
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise ModelError(
            f"Got a block output of {shape}, but expected a (batch, tokens, width) tensor. "
            "This architecture cannot be steered yet."
        )
    return hidden


def check_layers(layers: Iterable[int] | None, n_layers: int, whose: str) -> tuple[int, ...]:
    """Check layer indices and return them as a sorted tuple.

    Parameters
    ----------
    layers : iterable of int or None
        0-based block indices; None means all.
    n_layers : int
        Number of blocks.
    whose : str
        The model's name in error messages.

    Returns
    -------
    tuple of int

    Raises
    ------
    ModelError
        On an index out of range or given twice.
    """
    if layers is None:
        return tuple(range(n_layers))
    chosen = [int(layer) for layer in layers]
    for layer in chosen:
        if not 0 <= layer < n_layers:
            raise ModelError(
                f"Got layer {layer}, but expected 0 to {n_layers - 1}. {whose} has {n_layers} "
                "blocks, counted from 0."
            )
    if not chosen or len(set(chosen)) < len(chosen):
        raise ModelError(
            f"Got layers {chosen}, but expected at least one, each once. Correct the list."
        )
    return tuple(sorted(chosen))


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward function; its hooks stay.

    Parameters
    ----------
    module : Module
    forward : callable
        Takes what the module's own forward takes.
    """
    # An instance attribute shadows the method; accelerate may have put one there already.
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
