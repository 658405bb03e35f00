"""The ways in which weights can hold a vector that is added to the residual stream."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from expertsteer.models import find_blocks

__all__ = [
    "Rebuilt",
    "as_other_architectures",
    "with_added_blocks",
    "with_bias_switched_on",
    "with_own_bias",
]


@dataclass(frozen=True)
class Rebuilt:
    """A model that is the steered target.

    Attributes
    ----------
    model_class : type
    config : PreTrainedConfig
    state : dict of str to Tensor
        Tensors that did not change are shared with the target.
    how : str
        For the user.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    state: dict[str, torch.Tensor]
    how: str


# Biases -------------------------------------------------------------------------------


def with_own_bias(model: PreTrainedModel, biases: Mapping[str, torch.Tensor]) -> Rebuilt | None:
    """Add to the biases that the maps have already; None where one has none."""
    state = model.state_dict()
    if not all(f"{name}.bias" in state for name in biases):
        return None
    return Rebuilt(
        type(model),
        copy.deepcopy(model.config),
        _with_biases(state, biases),
        f"vectors in the biases of {_listed(biases)}",
    )


def with_bias_switched_on(
    model: PreTrainedModel, biases: Mapping[str, torch.Tensor]
) -> Rebuilt | None:
    """Switch on a setting of the architecture that gives the maps a bias, zero elsewhere."""
    for switch, config in _with_a_bias_switched_on(model.config):
        state = _with_new_biases(model, type(model), config, biases)
        if state is not None:
            how = f"{switch} on, vectors in the biases of {_listed(biases)}, other biases zero"
            return Rebuilt(type(model), config, state, how)
    return None


def _with_a_bias_switched_on(
    config: PreTrainedConfig,
) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield every setting that gives some maps a bias and is off, and the settings with it on."""
    for name, value in config.get_text_config().to_dict().items():
        if "bias" in name and value is False:
            changed = copy.deepcopy(config)
            setattr(changed.get_text_config(), name, True)
            yield name, changed


def as_other_architectures(
    model: PreTrainedModel, biases: Mapping[str, torch.Tensor]
) -> Iterator[Rebuilt]:
    """Yield the same weights as architectures that compute the same and have the biases."""
    own = model.config
    if own.model_type not in _HOSTED:
        return
    for model_class, config_class, differing in _HOSTS:
        settings = differing(own)
        if settings is None:
            continue
        shared = {
            name: getattr(own, name)
            for name in config_class().to_dict()
            if hasattr(own, name) and name not in _OF_THE_ARCHITECTURE
        }
        # Whether the attention has biases shows in the weights, not always in the settings.
        for attention_bias in (False, True):
            biased = {"mlp_bias": True, "attention_bias": attention_bias}
            try:
                config = config_class(**shared | biased | settings)
            except (ValueError, TypeError, StrictDataclassError):
                continue
            state = _with_new_biases(model, model_class, config, biases)
            if state is not None:
                how = f"written as {config.model_type}, vectors in the biases of {_listed(biases)}"
                yield Rebuilt(model_class, config, state, f"{how}, other biases zero")


_OF_THE_ARCHITECTURE = {
    "architectures",
    "attention_bias",
    "layer_types",
    "mlp_bias",
    "model_type",
    "sliding_window",
    "transformers_version",
    "use_sliding_window",
}


def _window(config: PreTrainedConfig) -> int | None:
    """Return the width of an attention window that is narrower than the context."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None or (layer_types and "sliding_attention" not in layer_types):
        return None
    return None if window >= config.max_position_embeddings else int(window)


def _llama_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    return {} if _window(config) is None else None


def _smollm3_settings(config: PreTrainedConfig) -> dict[str, Any]:
    window, n_layers = _window(config), config.num_hidden_layers
    default = ["full_attention" if window is None else "sliding_attention"] * n_layers
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": getattr(config, "layer_types", None) or default,
        "no_rope_layers": [1] * n_layers,
    }


_Host = tuple[
    type[PreTrainedModel],
    Any,  # the type of its settings, whose own signature takes any of them
    Callable[[PreTrainedConfig], "dict[str, Any] | None"],
]
# Pre-norm, rotary positions, gated MLP, biases where wanted. The second adds attention
# windows; vLLM runs it by way of transformers.
_HOSTS: tuple[_Host, ...] = (
    (LlamaForCausalLM, LlamaConfig, _llama_settings),
    (SmolLM3ForCausalLM, SmolLM3Config, _smollm3_settings),
)


# What is just that. Others have weights of the same names, and differ in ways that may show
# only after thousands of tokens, so trying them out does not tell.
_HOSTED = ("mistral", "qwen2")


# Added blocks -------------------------------------------------------------------------


def with_added_blocks(
    model: PreTrainedModel, vectors: Mapping[int, torch.Tensor]
) -> Rebuilt | None:
    r"""Put a block that adds the vector behind each steered one.

    All its weights are zero but three. A bias of 1 in the first value dimension makes the
    attention return 1 there whatever it attends to, for its weights sum to 1; a column of
    the output projection makes that the vector; the MLP returns 0. Where a norm follows
    the attention (Gemma), the column has unit root mean square and the norm's weight has
    the vector's length.
    """
    prefix = _blocks_name(model)
    old, n_old = model.state_dict(), len(find_blocks(model))
    deeper = _deeper(model.config, vectors, n_old)
    for config in (deeper, *(config for _, config in _with_a_bias_switched_on(deeper))):
        skeleton = _skeleton(type(model), config)
        if skeleton is not None and f"{prefix}.0.self_attn.v_proj.bias" in skeleton:
            break
    else:
        return None
    places = {layer: layer + sum(other < layer for other in vectors) for layer in range(n_old)}
    state = {}
    for name, tensor in old.items():
        layer, rest = _layer_of(name, prefix)
        state[name if layer is None else f"{prefix}.{places[layer]}.{rest}"] = tensor
    for layer, vector in vectors.items():
        added = f"{prefix}.{places[layer] + 1}."
        for name, tensor in old.items():
            if not name.startswith(f"{prefix}.{layer}."):
                continue
            rest = name.removeprefix(f"{prefix}.{layer}.")
            is_norm = "norm" in rest.split(".")[-2]
            state[f"{added}{rest}"] = tensor.clone() if is_norm else torch.zeros_like(tensor)
        _set_adding(state, added, vector, find_blocks(model)[layer])
    state = _filled(state, skeleton)
    if state is None:
        return None
    how = (
        f"{n_old + len(vectors)} blocks instead of {n_old}: one behind each of the layers "
        f"{', '.join(map(str, sorted(vectors)))} that adds its vector"
    )
    return Rebuilt(type(model), config, state, how)


def _set_adding(
    state: dict[str, torch.Tensor], added: str, vector: torch.Tensor, block: nn.Module
) -> None:
    weight = state[f"{added}self_attn.o_proj.weight"]
    value = state[f"{added}self_attn.v_proj.weight"]
    state[f"{added}self_attn.v_proj.bias"] = bias = torch.zeros_like(value[:, 0])
    bias[0] = 1.0
    column = vector
    # Where the MLP has a norm of its own behind it, "post_attention" is meant literally.
    if hasattr(block, "post_feedforward_layernorm"):
        length = float(vector.norm()) / len(vector) ** 0.5
        column = vector / length
        name = f"{added}post_attention_layernorm.weight"
        start = _weight_offset(block.get_submodule("post_attention_layernorm"), len(vector))
        state[name] = torch.full_like(state[name], length - start)
    weight[:, 0] = column


def _weight_offset(norm: nn.Module, width: int) -> float:
    """Return what a norm adds to its weight before it multiplies: 1 in Gemma, else 0."""
    trial = copy.deepcopy(norm).float().cpu()
    with torch.no_grad():
        trial.get_parameter("weight").zero_()
        return round(float(trial(torch.ones(1, width)).mean()))


def _deeper(config: PreTrainedConfig, layers: Collection[int], n_layers: int) -> PreTrainedConfig:
    """Return a configuration with a block more behind each of some layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == n_layers:  # one entry a layer
            longer = [entry for n, entry in enumerate(value) for _ in range(1 + (n in layers))]
            setattr(text, name, longer)
    text.num_hidden_layers = n_layers + len(layers)
    return config


def _blocks_name(model: PreTrainedModel) -> str:
    blocks = find_blocks(model)
    return next(name for name, module in model.named_modules() if module is blocks)


def _layer_of(name: str, prefix: str) -> tuple[int | None, str]:
    if not name.startswith(f"{prefix}."):
        return None, name
    layer, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return int(layer), rest


# Weights ------------------------------------------------------------------------------


def _with_new_biases(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    biases: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor] | None:
    """Return the weights of a model that differs by biases alone, or None."""
    skeleton = _skeleton(model_class, config)
    if skeleton is None or not all(f"{name}.bias" in skeleton for name in biases):
        return None
    state = _filled(model.state_dict(), skeleton)
    return None if state is None else _with_biases(state, biases)


def _skeleton(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> dict[str, tuple[int, ...]] | None:
    """Return names and shapes of a model's weights, or None for settings it refuses."""
    try:
        with torch.device("meta"):
            model: Any = model_class(copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, IndexError, StrictDataclassError):
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _filled(
    state: Mapping[str, torch.Tensor], skeleton: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor] | None:
    """Return weights for every name of a skeleton, new biases zero; None where they differ."""
    if not set(state) <= set(skeleton):
        return None
    filled = {}
    for name, shape in skeleton.items():
        if name in state:
            filled[name] = state[name]
        elif name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in state:
            weight = state[f"{name.removesuffix('.bias')}.weight"]
            filled[name] = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        else:
            return None
        if tuple(filled[name].shape) != shape:
            return None
    return filled


def _with_biases(
    state: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    changed = {}
    for name, added in biases.items():
        bias = state[f"{name}.bias"]
        # In float32: what is added may be far longer than the bias, or shorter.
        changed[f"{name}.bias"] = (bias.float() + added.to(bias.device)).to(bias.dtype)
    return dict(state) | changed


def _listed(names: Mapping[str, Any]) -> str:
    """Return what modules are called inside their blocks, without the blocks' numbers."""
    inside = {tuple(part for part in name.split(".")[-2:] if not part.isdigit()) for name in names}
    return ", ".join(sorted(map(".".join, inside)))
