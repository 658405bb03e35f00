"""An ordinary checkpoint that is steered for good: no package of ours where it runs.

What is added behind a block becomes the bias of the linear map that writes to the residual
stream last, `down_proj` in most architectures. Where an architecture has no such bias, the
same weights are written as one that has it and computes the same; where a norm stands in
the way, or nothing can hold the bias, a block that adds the vector and nothing else is put
behind the steered one, which takes an architecture with biases in its attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from expertsteer.errors import ModelError
from expertsteer.export.additive import ResidualWriter, find_residual_writers, random_tokens
from expertsteer.export.job import ExportJob
from expertsteer.export.rebuilding import (
    Rebuilt,
    as_other_architectures,
    with_added_blocks,
    with_bias_switched_on,
    with_own_bias,
)
from expertsteer.files import replacing_folder, write_text
from expertsteer.models import LanguageModel
from expertsteer.models.loading import quiet_loading
from expertsteer.steering import Steering

__all__ = ["CHECKPOINT_RECORD", "write_checkpoint"]

# The file beside the weights that tells what is in them.
CHECKPOINT_RECORD = "steering.json"
_N_CHECKED_TOKENS = 16
# Largest difference of a logit, relative to the largest logit, that rounding explains.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def write_checkpoint(job: ExportJob, path: Path) -> str:
    """Write the target's weights with the vectors in them, its tokenizer and settings.

    What is written has given the same logits, on random tokens, as the target under
    steering hooks.

    Raises
    ------
    ModelError
        If the model is quantised, or nothing in its architecture can hold the vectors.
    """
    target = job.language_model
    _refuse_quantised(target)
    rebuilt, steered = _steered_model(target, job.vectors)
    with replacing_folder(path, overwrite=job.overwrite) as folder:
        with quiet_loading():
            steered.save_pretrained(folder)
        target.tokenizer.save_pretrained(folder)
        record = {"how": rebuilt.how} | job.summary()
        write_text(folder / CHECKPOINT_RECORD, json.dumps(record, indent=2) + "\n")
    return f"{rebuilt.config.model_type} checkpoint: {rebuilt.how}"


def _refuse_quantised(target: LanguageModel) -> None:
    found = getattr(target.model.config, "quantization_config", None)
    if found is not None or getattr(target.model, "hf_quantizer", None) is not None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        method = method or getattr(found, "quant_method", None) or "an unknown method"
        raise ModelError(
            f"Got {target.name}, which is quantised ({getattr(method, 'value', method)}), but "
            "expected plain weights to add to. Load it unquantised, or export to gguf or peft."
        )


def _steered_model(
    target: LanguageModel, vectors: dict[int, torch.Tensor]
) -> tuple[Rebuilt, PreTrainedModel]:
    """Return the first model that holds the vectors and computes what steering computes."""
    writers = find_residual_writers(target, vectors)
    tokens = random_tokens(target, _N_CHECKED_TOKENS)
    with Steering(target.model, vectors):
        expected = _logits(target.model, tokens)
    allowed = _ROUNDING.get(target.model.dtype, 1e-4) * float(expected.abs().max())
    for rebuilt in _ways(target.model, vectors, writers):
        steered = _assembled(target.model, rebuilt)
        # Architectures may share the names of all their weights and still differ.
        if float((_logits(steered, tokens) - expected).abs().max()) <= allowed:
            return rebuilt, steered
    blocked = [layer for layer, writer in writers.items() if writer is None]
    reason = (
        f"no linear map of the layers {', '.join(map(str, blocked))} is added to the residual "
        "stream as it is (experts, a norm or a gate stand between)"
        if blocked
        else "its MLP has no bias, and no architecture known here has one and computes the same"
    )
    raise ModelError(
        f"Got {target.name} of type {target.model.config.model_type!r}, whose weights cannot hold "
        f"a vector: {reason}, and an added block, which needs a bias in the attention, does not "
        "compute it either. Use --to gguf with llama.cpp, --to lm-eval, or the pack itself."
    )


def _ways(
    model: PreTrainedModel,
    vectors: dict[int, torch.Tensor],
    writers: dict[int, ResidualWriter | None],
) -> Iterator[Rebuilt]:
    """Yield the ways to hold the vectors, those that cost nothing at run time first."""
    biases = {w.name: vectors[layer] / w.factor for layer, w in writers.items() if w is not None}
    if len(biases) == len(vectors):
        for way in (with_own_bias, with_bias_switched_on):
            yield from filter(None, [way(model, biases)])
        yield from as_other_architectures(model, biases)
    yield from filter(None, [with_added_blocks(model, vectors)])


def _assembled(model: PreTrainedModel, rebuilt: Rebuilt) -> PreTrainedModel:
    made: Any = rebuilt.model_class
    with quiet_loading():
        steered = made.from_pretrained(
            None, config=rebuilt.config, state_dict=rebuilt.state, dtype=model.dtype
        )
    steered.generation_config = model.generation_config
    return steered.to(model.device).eval()


def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    run: Any = model
    with torch.no_grad():
        return run(tokens, use_cache=False).logits.float()
