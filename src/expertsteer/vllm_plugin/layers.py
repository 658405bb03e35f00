"""Make the decoder layers of a model of vLLM add vectors, in graphs as well.

Behind a steered layer, ``coefficients[:n] @ vectors`` is added to the n tokens of the
pass: a row of coefficients a token, one coefficient a pack. Both tensors are buffers that
stay where they are. What is compiled or captured once serves every mixture of steered
and unsteered requests; between passes only the coefficients' values change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from expertsteer.errors import ModelError, PackError

__all__ = ["find_layers", "steer_layers"]

_COEFFICIENTS = "expertsteer_coefficients"
_VECTORS = "expertsteer_vectors"


def find_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """Return the list of decoder layers of a model of vLLM.

    Parameters
    ----------
    model : Module
    n_layers : int
        Of the whole model. Where it is split into stages, the layers of other stages
        are in the list as placeholders.

    Returns
    -------
    ModuleList

    Raises
    ------
    ModelError
        If there is not exactly one outermost list of that length.
    """
    # Of several modalities, the text model's.
    text_model: Any = getattr(model, "get_language_model", lambda: model)
    decoder: nn.Module = text_model()
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not inside:
            found[name] = module
    if len(found) != 1:
        raise ModelError(
            f"Got {type(model).__name__} with {len(found)} lists of {n_layers} layers, but "
            "expected exactly one list of decoder layers. This architecture cannot be steered yet."
        )
    return next(iter(found.values()))


def steer_layers(
    model: nn.Module,
    n_layers: int,
    packs: Sequence[Mapping[int, torch.Tensor]],
    coefficients: torch.Tensor,
) -> None:
    """Make every layer that a pack steers add its vector, times a coefficient a token.

    Parameters
    ----------
    model : Module
        A model of vLLM, not yet compiled.
    n_layers : int
        Of the whole model.
    packs : sequence of mapping of int to Tensor of shape (width,)
        What each pack adds behind a layer where its coefficient is 1.
    coefficients : Tensor of shape (tokens, packs)
        Read in every pass. float32, on the model's device.

    Raises
    ------
    PackError
        If a vector is not finite: in the sum over packs it would reach every request.
    """
    layers = find_layers(model, n_layers)
    for layer in sorted(set().union(*packs)):
        block = layers[layer]
        if not any(True for _ in block.parameters()):
            continue  # of another stage of the pipeline
        width = next(iter(packs))[min(next(iter(packs)))].shape[0]
        vectors = torch.stack([pack.get(layer, torch.zeros(width)) for pack in packs])
        if not bool(torch.isfinite(vectors).all()):
            raise PackError(f"Got a vector with NaN or infinity for layer {layer}.")
        block.register_buffer(_COEFFICIENTS, coefficients, persistent=False)
        block.register_buffer(_VECTORS, vectors.to(coefficients.device), persistent=False)
        block.register_forward_hook(_add)


def _add(block: Any, _inputs: Any, output: Any) -> Any:
    # Layers return what they add to the residual stream, beside the stream or summed
    # with it; either way the vector joins the stream.
    hidden = output[0] if isinstance(output, tuple) else output
    coefficients = block.expertsteer_coefficients.narrow(0, 0, hidden.shape[-2])
    # In float32, so that in bfloat16 only the vector is rounded, not its strength.
    added = torch.mm(coefficients, block.expertsteer_vectors)
    steered = hidden + added.to(hidden.dtype)
    return (steered, *output[1:]) if isinstance(output, tuple) else steered
