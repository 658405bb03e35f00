"""Models: load them, find their decoder blocks, tell one from another."""

from expertsteer.models.blocks import (
    block_output,
    check_layers,
    find_blocks,
    residual_width,
    unwrap,
)
from expertsteer.models.embedded import EMBEDDED_MODELS
from expertsteer.models.fingerprint import ModelDescription, describe_model, explain_mismatch
from expertsteer.models.loading import DTYPES, LanguageModel, ModelSource, load_model, locate_model

__all__ = [
    "DTYPES",
    "EMBEDDED_MODELS",
    "LanguageModel",
    "ModelDescription",
    "ModelSource",
    "block_output",
    "check_layers",
    "describe_model",
    "explain_mismatch",
    "find_blocks",
    "load_model",
    "locate_model",
    "residual_width",
    "unwrap",
]
