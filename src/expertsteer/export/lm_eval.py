"""The file that the lm-evaluation-harness's own model "steered" reads.

It is a dictionary saved by torch: what to add, by the name that the block has inside the
model's ``base_model``. The harness's loader unpickles it; this package only ever writes it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from expertsteer.errors import ModelError
from expertsteer.export.job import ExportJob
from expertsteer.files import replacing
from expertsteer.models import find_blocks

__all__ = ["write_steer_file"]


def write_steer_file(job: ExportJob, path: Path) -> str:
    """Write the file that ``steer_path`` names.

    Raises
    ------
    ModelError
        If transformers does not know the target's architecture by itself.
    """
    blocks = _blocks_name(job.pack.target.model_type)
    hooks = {
        f"{blocks}.{layer}": {
            "action": "add",
            "steering_vector": vector,
            "steering_coefficient": 1.0,
            "bias": None,
            "head_index": None,
        }
        for layer, vector in job.vectors.items()
    }
    with replacing(path) as scratch:
        torch.save(hooks, scratch)
    return f"for lm_eval --model steered, hookpoints {', '.join(hooks)}"


def _blocks_name(model_type: str) -> str:
    """Return what an architecture calls its list of blocks, from a model without weights."""
    try:
        config = AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"Got a pack for a model of type {model_type!r}, but expected an architecture that "
            "transformers has itself: the harness goes by the names of its modules. Use "
            "expertsteer-lm-eval, which takes the pack as it is."
        ) from error
    blocks = find_blocks(model)
    return next(name for name, module in model.base_model.named_modules() if module is blocks)
