"""Models: load them, find their decoder blocks, tell one from another."""

from expertsteer.models.blocks import (
    block_output,
    check_layers,
    find_blocks,
    replaced_forward,
    residual_width,
    unwrap,
)
from expertsteer.models.clock import seconds_of_work
from expertsteer.models.embedded import EMBEDDED_MODELS
from expertsteer.models.fingerprint import ModelDescription, describe_model, explain_mismatch
from expertsteer.models.loading import DTYPES, LanguageModel, ModelSource, load_model, locate_model
from expertsteer.models.sentence_encoder import SentenceEncoder, load_sentence_encoder

__all__ = [
    "DTYPES",
    "EMBEDDED_MODELS",
    "LanguageModel",
    "ModelDescription",
    "ModelSource",
    "SentenceEncoder",
    "block_output",
    "check_layers",
    "describe_model",
    "explain_mismatch",
    "find_blocks",
    "load_model",
    "load_sentence_encoder",
    "locate_model",
    "replaced_forward",
    "residual_width",
    "seconds_of_work",
    "unwrap",
]
