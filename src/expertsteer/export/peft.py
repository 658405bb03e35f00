"""Adapters for the package peft.

LoRA is the tuner that every version of peft loads and that can carry a bias
(``lora_bias``): both matrices are zero, and the bias of the second is the vector.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from expertsteer.errors import ModelError
from expertsteer.export.additive import ResidualWriter, find_residual_writers
from expertsteer.export.job import ExportJob
from expertsteer.export.weights import CHECKPOINT_RECORD
from expertsteer.files import replacing_folder, write_text
from expertsteer.fine_tuning import import_peft

__all__ = ["write_adapter"]


def write_adapter(job: ExportJob, path: Path) -> str:
    """Write what ``PeftModel.from_pretrained`` reads.

    Raises
    ------
    ModelError
        If no linear map of a steered block writes to the residual stream as it is.
    ExpertSteerError
        If the package peft is missing.
    """
    peft = import_peft()
    target = job.language_model
    found = find_residual_writers(target, job.vectors)
    writers = {layer: writer for layer, writer in found.items() if writer is not None}
    blocked = sorted(found.keys() - writers.keys())
    if blocked:
        raise ModelError(
            f"Got {target.name} of type {target.model.config.model_type!r}, but adapters change "
            f"linear maps, and none of the layers {', '.join(map(str, blocked))} is added to the "
            "residual stream as it is (experts, a norm or a gate stand between). Use --to "
            "weights, --to gguf or the pack itself."
        )
    tensors = {}
    for layer, writer in writers.items():
        tensors |= _zero_matrices(writer, job.vectors[layer] / writer.factor)
    config = peft.LoraConfig(
        r=1,
        lora_alpha=1,
        lora_bias=True,
        target_modules=[writer.name for writer in writers.values()],
        fan_in_fan_out=any(isinstance(writer.module, Conv1D) for writer in writers.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=target.name,
        inference_mode=True,
    )
    with replacing_folder(path, overwrite=job.overwrite) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        write_text(folder / CHECKPOINT_RECORD, json.dumps(job.summary(), indent=2) + "\n")
    return "LoRA adapter of zero matrices with the vectors as biases"


def _zero_matrices(writer: ResidualWriter, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    weight: torch.Tensor = writer.module.get_parameter("weight")
    n_in = weight.shape[0] if isinstance(writer.module, Conv1D) else weight.shape[1]
    name = f"base_model.model.{writer.name}"
    return {
        f"{name}.lora_A.weight": torch.zeros(1, n_in),
        f"{name}.lora_B.weight": torch.zeros(len(bias), 1),
        f"{name}.lora_B.bias": bias.contiguous(),
    }
