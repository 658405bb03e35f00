"""Where in a block a constant can be added so that it reaches the residual stream unchanged."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from expertsteer.models import LanguageModel, block_output

__all__ = ["ResidualWriter", "find_residual_writers", "random_tokens"]

_N_TOKENS = 8
# Float32 rounding of a sum with states up to thousands of times as long.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ResidualWriter:
    """A linear map of a block whose output is added to the residual stream as it is.

    Attributes
    ----------
    name : str
        Of the module inside the model, such as "model.layers.3.mlp.down_proj".
    module : Linear or Conv1D
    factor : float
        By which the block multiplies it on the way; 1 but for a few architectures.
    """

    name: str
    module: nn.Module
    factor: float


def random_tokens(model: LanguageModel, n_tokens: int) -> torch.Tensor:
    """Return a row of token ids, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, n_tokens), generator=generator).to(model.device)


def find_residual_writers(
    model: LanguageModel, layers: Iterable[int]
) -> dict[int, ResidualWriter | None]:
    """Find, in each block, the last linear map that writes straight to the residual stream.

    Found by trying, never by a family's name: a random vector is added to the output of
    each linear map of a copy of the block in float32, last one first, and the block's
    output must move by that vector, or one multiple of it, at every token.

    Parameters
    ----------
    model : LanguageModel
        Nothing of it changes.
    layers : iterable of int
        0-based blocks.

    Returns
    -------
    dict of int to ResidualWriter or None
        None where a norm or a gate stands between every map and the residual stream.

    Notes
    -----
    Source: this project.
    """
    inputs = _block_inputs(model, layers)
    names: dict[nn.Module, str] = {m: name for name, m in model.model.named_modules()}
    return {
        layer: _residual_writer(model.blocks[layer], names, *given)
        for layer, given in inputs.items()
    }


def _block_inputs(
    model: LanguageModel, layers: Iterable[int]
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what each block is called with when the model reads some tokens."""
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for layer in layers:

        def keep(
            _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer
        ) -> None:
            found[layer] = (args, kwargs)

        handles.append(model.blocks[layer].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model.model(random_tokens(model, _N_TOKENS), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _residual_writer(
    block: nn.Module, names: dict[nn.Module, str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ResidualWriter | None:
    trial = copy.deepcopy(block).float()
    args, kwargs = pytree.tree_map(_in_float32, (args, kwargs))

    def run() -> torch.Tensor:
        with torch.no_grad():
            return block_output(trial(*args, **kwargs))

    # Which module of the block belongs to which of the copy, in the order they are called.
    called: list[tuple[nn.Module, nn.Module]] = []
    handles = [
        copied.register_forward_hook(lambda m, _i, _o, own=own: called.append((own, m)))
        for own, copied in zip(block.modules(), trial.modules(), strict=True)
        if isinstance(own, nn.Linear | Conv1D)
    ]
    before = run()
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(0)
    length = float(before.norm(dim=-1).mean())
    added = torch.randn(before.shape[-1], generator=generator).to(before.device)
    added *= length / added.norm()
    for own, copied in reversed(called):
        width = own.nf if isinstance(own, Conv1D) else own.out_features
        if width != len(added) or sum(own is other for other, _ in called) > 1:
            continue
        handle = copied.register_forward_hook(functools.partial(_add, added=added))
        moved = run() - before
        handle.remove()
        factor = float((moved @ added).mean() / (added @ added))
        error = (moved - factor * added).abs().max() / added.abs().max()
        if abs(factor) > _TOLERANCE and float(error) <= _TOLERANCE * abs(factor):
            return ResidualWriter(names[own], own, _rounded(factor))
    return None


def _add(
    _module: nn.Module, _inputs: Any, output: torch.Tensor, *, added: torch.Tensor
) -> torch.Tensor:
    return output + added


def _in_float32(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_float else value


def _rounded(factor: float) -> float:
    """Return the factor that the measured one stands for: 1 in nearly every architecture."""
    return 1.0 if abs(factor - 1) < _TOLERANCE else factor
