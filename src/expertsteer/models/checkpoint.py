"""Describe a checkpoint on disk without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from expertsteer.errors import ModelError
from expertsteer.models.blocks import find_blocks, residual_width
from expertsteer.models.fingerprint import ModelDescription, parameters_fingerprint

__all__ = ["describe_checkpoint"]

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def describe_checkpoint(folder: str | Path, name: str | None = None) -> ModelDescription:
    """Describe a checkpoint as `describe_model` describes the model it loads as.

    The model is built without memory for its weights; of the weights' files only the
    pages that the fingerprint samples are read. So a server can compare a pack with the
    model it is about to load in another process.

    Parameters
    ----------
    folder : str or Path
        A folder that transformers saved: ``config.json`` and safetensors files.
    name : str, optional
        What the user called it; default: the folder.

    Returns
    -------
    ModelDescription

    Raises
    ------
    ModelError
        If the folder is no such checkpoint, if transformers does not know the
        architecture, or if the files do not hold every parameter under its name: those
        of quantised checkpoints, and of families whose tensors transformers renames or
        joins while it loads them.

    Notes
    -----
    Source: this project.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"Cannot describe the checkpoint {folder}: {reason}") from error
    files = _files_of_tensors(folder)
    shapes = {parameter: tuple(p.shape) for parameter, p in model.named_parameters()}
    return ModelDescription(
        name=name or str(folder),
        revision=getattr(config, "_commit_hash", None),
        model_type=config.model_type,
        n_layers=len(find_blocks(model)),
        width=residual_width(model),
        vocabulary=int(config.get_text_config().vocab_size),
        weights=parameters_fingerprint(
            _stored_parameters(folder, files, shapes, model.base_model_prefix)
        ),
    )


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Return the file that each stored tensor is in."""
    try:
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            return {name: folder / file for name, file in index["weight_map"].items()}
        with safe_open(folder / _ONE_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / _ONE_FILE)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(
            f"Got {folder}, but expected a checkpoint with {_ONE_FILE} or {_INDEX} ({error})."
        ) from error


def _stored_parameters(
    folder: Path, files: dict[str, Path], shapes: dict[str, tuple[int, ...]], prefix: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in shapes.items():
        # Checkpoints of the bare decoder leave its name out.
        stored = next((n for n in (name, name.removeprefix(f"{prefix}.")) if n in files), None)
        if stored is None:
            raise ModelError(
                f"Got {folder} without the tensor {name!r}, but expected every parameter of the "
                "model under its name. A checkpoint that is quantised, or whose tensors "
                "transformers renames, cannot be described without loading it."
            )
        try:
            with safe_open(files[stored], framework="pt") as file:
                tensor = file.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"Got {folder}, but expected the tensor {stored!r} in {files[stored].name}, as its "
                f"index says ({error}). Download the checkpoint again."
            ) from error
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"Got {folder} with {name!r} of shape {tuple(tensor.shape)}, but expected {shape}."
            )
        yield name, tensor
