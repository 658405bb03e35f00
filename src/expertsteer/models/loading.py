"""Load a target or an expert from wherever its user keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate.utils import get_max_memory
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from expertsteer.errors import ModelError
from expertsteer.models.blocks import find_blocks
from expertsteer.models.embedded import EMBEDDED_MODELS, embedded_checkpoint
from expertsteer.models.fingerprint import ModelDescription, describe_model
from expertsteer.models.gguf import converted_checkpoint
from expertsteer.models.precision import fastest_dtype, warn_of_slow_dtype
from expertsteer.processes import local_share, n_local_processes, n_processes

__all__ = ["DTYPES", "LanguageModel", "ModelSource", "load_model", "locate_model", "quiet_loading"]

DTYPES = ("auto", "fastest", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LanguageModel:
    """A decoder language model with its tokenizer.

    Attributes
    ----------
    model : PreTrainedModel
        The model, in evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer, with a padding token.
    name : str
        What the user called it.
    revision : str or None
        Hub revision asked for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None = None

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """Decoder blocks, first to last."""
        return find_blocks(self.model)

    @cached_property
    def description(self) -> ModelDescription:
        """Architecture and fingerprint, for provenance."""
        return describe_model(self.model, self.name, self.revision)

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        embeddings = self.model.get_input_embeddings()
        weight = cast(torch.Tensor, embeddings.weight)
        hook = getattr(embeddings, "_hf_hook", None)
        if weight.is_meta and hook is not None:  # waits elsewhere, is brought where it computes
            return torch.device(hook.execution_device)
        return weight.device

    @property
    def algebra_device(self) -> torch.device:
        """The GPU that holds the whole model, else the CPU: where its states are worked on.

        A model that needs several GPUs leaves little room on any; and other accelerators lack
        the float64 that closed forms take.
        """
        places = {weight.device for weight in self.model.parameters()}
        if len(places) == 1 and next(iter(places)).type == "cuda":
            return places.pop()
        return torch.device("cpu")

    @property
    def pad_token_id(self) -> int:
        """Token that fills batches; masked, so any serves where the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def end_token_ids(self) -> set[int]:
        """Tokens that end what the model writes."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        return {ids} if isinstance(ids, int) else set(ids or ())

    def chat_prompt(self, turns: list[dict[str, str]]) -> str:
        """Return a conversation as text, up to where the model's next answer begins.

        Parameters
        ----------
        turns : list of dict
            With the keys "role" and "content".

        Returns
        -------
        str
            With special tokens.

        Raises
        ------
        ModelError
            If the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"Got a chat for {self.name}, but expected a tokenizer with a chat template; base "
                "models usually have none. Leave the chat template off."
            )
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )

    def generate(self, **options: Any) -> torch.Tensor:
        """Run the model's own ``generate`` and return token ids, (batch, tokens)."""
        return cast(Any, self.model).generate(pad_token_id=self.pad_token_id, **options)

    @property
    def context_length(self) -> int:
        """Most tokens a text may have."""
        config = self.model.config.get_text_config()
        limits = [
            getattr(config, "max_position_embeddings", None),
            self.tokenizer.model_max_length,  # a huge number where the tokenizer has no limit
        ]
        return min(int(limit) for limit in limits if limit)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how to load it.

    Attributes
    ----------
    name : str
        A hub id, a local folder, a ``.gguf`` file (converted once into the cache) or an
        embedded name (`EMBEDDED_MODELS`).
    dtype : {"auto", "fastest", "float32", "bfloat16", "float16"} or torch.dtype
        "auto" is the checkpoint's own, "fastest" bfloat16 where the device has instructions
        for it and float32 elsewhere.
    device : str or None
        For example "cuda:0"; None: the CPU, or what ``device_map`` says. Of several
        processes on a machine each takes another GPU for "cuda".
    device_map : str, dict or None
        Passed to transformers; "auto" spreads the model over the devices: of several
        processes on a machine, each over its share of the GPUs.
    revision : str or None
        Branch, tag or commit on the hub.
    attn_implementation : str or None
        Passed to transformers: "eager", "sdpa", "flash_attention_2", ...
    trust_remote_code : bool
        Run code that comes with the model. Only for models you trust.
    """

    name: str
    dtype: str | torch.dtype = "auto"
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


def load_model(source: str | Path | ModelSource | LanguageModel, **options: Any) -> LanguageModel:
    """Load a decoder language model and its tokenizer.

    Parameters
    ----------
    source : str, Path, ModelSource or LanguageModel
        The model's name, with or without how to load it; a loaded model is returned as
        it is.
    **options
        Fields of `ModelSource`, where ``source`` is a name.

    Returns
    -------
    LanguageModel

    Raises
    ------
    ModelError
        If the model cannot be found or loaded, or is not a decoder with blocks.
    """
    if isinstance(source, LanguageModel):
        return source
    if not isinstance(source, ModelSource):
        source = ModelSource(str(source), **options)
    if isinstance(source.dtype, str) and source.dtype not in DTYPES:
        raise ModelError(f"Got dtype={source.dtype!r}, but expected one of {', '.join(DTYPES)}.")
    if source.device is not None and source.device_map is not None:
        raise ModelError("Got both device and device_map, but expected one of them. Leave one out.")
    common = {
        "revision": source.revision or "main",
        "trust_remote_code": source.trust_remote_code,
    }
    place = locate_model(source.name)
    dtype = fastest_dtype(_device_type(source)) if source.dtype == "fastest" else source.dtype
    if source.device is None and source.device_map is None:
        _require_memory(Path(place), dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **common)
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype,
                **_placement(source),
                attn_implementation=source.attn_implementation,
                **common,
            )
    except Exception as error:  # of any kind: the tokenizers library raises bare Exception
        reason = " ".join(str(error).split())
        raise ModelError(
            f"Got the model {source.name!r}, but expected one that transformers can load: "
            f"{reason[:1000]}"
        ) from error
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    find_blocks(model)  # an encoder is refused here, not after minutes of collecting
    warn_of_slow_dtype(model, source.name)
    return LanguageModel(model.eval(), tokenizer, source.name, source.revision)


# Values of device_map that are no device.
_SPREADINGS = ("auto", "balanced", "balanced_low_0", "sequential")


def _device_type(source: ModelSource) -> str:
    """Return the type of device that most of the weights will be on."""
    place = source.device or source.device_map or "cpu"
    if isinstance(place, str) and place not in _SPREADINGS:
        return place.partition(":")[0]
    return "cuda" if torch.cuda.is_available() else "cpu"


def _placement(source: ModelSource) -> dict[str, Any]:
    """Return where transformers puts the weights; processes of one machine share its GPUs."""
    if n_processes() == 1 or (source.device != "cuda" and not isinstance(source.device_map, str)):
        return {"device_map": source.device_map or source.device}
    gpus = local_share(range(torch.cuda.device_count()))
    if not gpus and (source.device or torch.cuda.is_available()):
        raise ModelError(
            f"Got {torch.cuda.device_count()} GPUs for more processes than that, but expected one "
            "at least for each. Start fewer processes a machine."
        )
    if source.device_map is None:
        return {"device_map": f"cuda:{gpus[0]}"}
    memory = get_max_memory()
    own: dict[Any, Any] = {place: size for place, size in memory.items() if place in gpus}
    # Every process may offload as much as the others.
    own["cpu"] = int(memory["cpu"] / n_local_processes())
    return {"device_map": source.device_map, "max_memory": own}


def locate_model(name: str | Path) -> str:
    """Return where transformers finds a model; files are converted to checkpoints first.

    Parameters
    ----------
    name : str or Path
        As in `ModelSource`.

    Returns
    -------
    str
        A folder, or the hub id as it is.

    Raises
    ------
    ModelError
        If there is no such file, folder or embedded model.
    """
    name = str(name)
    if name in EMBEDDED_MODELS:
        return str(embedded_checkpoint(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(
                f"Got the model {name!r}, but expected a file that exists. Check its path."
            )
        return str(converted_checkpoint(path))
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"Got the model {name!r}, but expected a folder that exists. Check its path."
        )
    if "/" not in name and name not in _CANONICAL:
        known = ", ".join(EMBEDDED_MODELS)
        raise ModelError(
            f"Got the model {name!r}, but expected a hub id (owner/name), a folder, a .gguf file "
            f"or an embedded name ({known})."
        )
    return name


def _require_memory(folder: Path, dtype: str | torch.dtype) -> None:
    """Raise before a checkpoint on disk is read that memory cannot hold."""
    wanted = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    stored = _ITEM_SIZES.get(part.get_dtype(), 4)
                    wanted += math.prod(part.get_shape()) * _item_size(dtype, stored)
        except (SafetensorError, OSError):
            return  # the load itself says what is wrong with it
    available = psutil.virtual_memory().available
    if wanted > available:
        raise ModelError(
            f"Got {available / 1e9:.1f} GB of free memory, but expected {wanted / 1e9:.1f} GB for "
            f"the weights in {folder}. Choose dtype='bfloat16', a device or a smaller model."
        )


_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _item_size(dtype: str | torch.dtype, stored: int) -> int:
    if dtype == "auto":
        return stored
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize


# Hub ids from before owners existed.
_CANONICAL = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the per-shard bars of transformers, which only flicker."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
