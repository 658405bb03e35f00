"""Describe a model well enough to notice later that another one was loaded."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from expertsteer.errors import ModelError
from expertsteer.models.blocks import find_blocks, residual_width

__all__ = [
    "ModelDescription",
    "describe_model",
    "explain_mismatch",
    "parameters_fingerprint",
    "weights_fingerprint",
]

_SAMPLES_A_PARAMETER = 32
# float16 holds smaller values with fewer digits than bfloat16.
_SMALLEST = 2.0**-14


@dataclass(frozen=True)
class ModelDescription:
    """What a pack remembers of a model.

    Attributes
    ----------
    name : str
        Hub id, folder name or embedded name.
    revision : str or None
        Commit of the hub repository, where there is one.
    model_type : str
        The architecture as transformers names it.
    n_layers, width, vocabulary : int
        Decoder blocks, residual width, size of the embedding table.
    weights : str
        Fingerprint of the weights, see `weights_fingerprint`.
    """

    name: str
    revision: str | None
    model_type: str
    n_layers: int
    width: int
    vocabulary: int
    weights: str

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON types."""
        return asdict(self)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a fingerprint of a model's weights, the same in float32 and bfloat16.

    A few evenly spaced values of every parameter, rounded to bfloat16, go through
    SHA-256 with the parameter's name and shape: a fine-tune shows, loading in
    bfloat16 does not, and a large model costs milliseconds. Loading in float16 does
    not show either if the checkpoint itself is bfloat16; a float32 checkpoint rounded
    to float16 is other values.

    Parameters
    ----------
    model : PreTrainedModel
        The model, on any devices; weights that wait in memory or on disk for their
        turn are fetched.

    Returns
    -------
    str
        16 hexadecimal digits.

    Raises
    ------
    ModelError
        If weights have no values.

    Notes
    -----
    Source: this project.
    """
    # Out of memory, tied parameters are no longer one object; the first name counts.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    named = (
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not (name in tied and parameter.is_meta)
    )
    return parameters_fingerprint(named, functools.partial(_sample, model))


def parameters_fingerprint(
    parameters: Iterable[tuple[str, torch.Tensor]],
    spaced: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, parameter: _spaced(parameter),
) -> str:
    """Return the fingerprint of named parameters, see `weights_fingerprint`.

    Parameters
    ----------
    parameters : iterable of (str, Tensor)
        In any order. A tensor that lies in a mapped file is read only where it is sampled.
    spaced : callable, optional
        From a name and a parameter to its evenly spaced values, where they lie elsewhere.

    Returns
    -------
    str
        16 hexadecimal digits.

    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, parameter in sorted(parameters, key=lambda named: named[0]):
            sample = spaced(name, parameter).to("cpu", torch.bfloat16)
            sample = torch.where(sample.abs() < _SMALLEST, 0, sample)
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(model: PreTrainedModel, name: str, parameter: torch.Tensor) -> torch.Tensor:
    if parameter.is_meta:
        from accelerate.utils import align_module_device, has_offloaded_params

        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        if not has_offloaded_params(module):
            raise ModelError(
                f"Got parameter {name!r} without values, but expected a model whose weights are "
                "loaded. Load it with load_model."
            )
        with align_module_device(module, torch.device("cpu")):
            return _spaced(getattr(module, own_name)).clone()
    return _spaced(parameter)


def _spaced(parameter: torch.Tensor) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES_A_PARAMETER)
    return flat[::step][:_SAMPLES_A_PARAMETER]


def describe_model(
    model: PreTrainedModel, name: str | None = None, revision: str | None = None
) -> ModelDescription:
    """Describe a model for the provenance of packs, alignments and saved states.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    name, revision : str, optional
        What the user called it; default: what transformers remembers.

    Returns
    -------
    ModelDescription
    """
    text = model.config.get_text_config()
    return ModelDescription(
        name=name or model.config._name_or_path or type(model).__name__,
        revision=revision or getattr(model.config, "_commit_hash", None),
        model_type=model.config.model_type,
        n_layers=len(find_blocks(model)),
        width=residual_width(model),
        vocabulary=int(text.vocab_size),
        weights=weights_fingerprint(model),
    )


def explain_mismatch(
    expected: ModelDescription, found: ModelDescription, *, shape_only: bool = False
) -> str | None:
    """Say how two models differ, or return None where they are the same model.

    Parameters
    ----------
    expected, found : ModelDescription
        The model something was made for, and the one at hand.
    shape_only : bool, default=False
        Compare only what decides whether vectors fit at all: depth and width.

    Returns
    -------
    str or None
        For example ``"18 blocks instead of 30, width 640 instead of 576"``.
    """
    differences = []
    if found.n_layers != expected.n_layers:
        differences.append(f"{found.n_layers} blocks instead of {expected.n_layers}")
    if found.width != expected.width:
        differences.append(f"width {found.width} instead of {expected.width}")
    if not shape_only:
        if found.model_type != expected.model_type:
            differences.append(f"type {found.model_type} instead of {expected.model_type}")
        if not differences and found.weights != expected.weights:
            differences.append(
                f"weights {found.weights} instead of {expected.weights} (same shape, "
                "other values: a fine-tune, another revision or a quantised copy)"
            )
    return ", ".join(differences) or None
