"""Tiny randomly initialised models of many families, and a tokenizer for them."""

from __future__ import annotations

import functools
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack

WIDTH = 32
N_LAYERS = 3
VOCABULARY = 100
CONTEXT = 64

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
WORDS = tuple(f"w{n}" for n in range(VOCABULARY - len(_SPECIAL)))

CHAT_TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}> {{ turn['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": 4, "n_positions": CONTEXT}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}

# What differs from `_COMMON`; None removes a key.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 8},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gemma2": _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {"num_key_value_heads": 2},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "olmo2": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen3_moe": _GROUPED | _EXPERTS,
    "bloom": {"n_layer": N_LAYERS, "n_head": 4},
    "stablelm": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    # Attention and convolution blocks take turns.
    "lfm2": {
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
}
# No key-value cache: blocks that only carry a recurrent state.
RECURRENT = ("mamba",)

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "norm_f", "embedding_norm")


@functools.cache
def tiny_model(family: str, seed: int = 0, n_layers: int = N_LAYERS) -> PreTrainedModel:
    """Build a model of width 32 with random weights, in evaluation mode.

    It is shared by all tests: whoever changes weights makes a copy first.
    """
    settings = _COMMON | FAMILIES[family]
    for name in ("num_hidden_layers", "n_layer"):
        if name in settings:
            settings[name] = n_layers
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Families begin with weights of very different size, some so small that a random
    # model repeats its input whatever is added to it.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(0, 0.15)
    return model.eval()


@functools.cache
def tiny_tokenizer(chat: bool = False, bos: bool = True) -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token a word: "w0 w1 w2"."""
    vocabulary = {token: n for n, token in enumerate((*_SPECIAL, *WORDS))}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.Fuse()
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def tiny_language_model(family: str, chat: bool = False) -> LanguageModel:
    """Return a tiny model together with the tiny tokenizer."""
    return LanguageModel(tiny_model(family), tiny_tokenizer(chat), f"tiny-{family}")


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return token ids of plain words, shape (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(_SPECIAL), VOCABULARY, (rows, length), generator=generator)


def random_vector(seed: int = 0, length: float = 3.0) -> torch.Tensor:
    """Return a vector of the tiny models' width."""
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return length * vector / vector.norm()


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Return what a model applies behind its last block."""
    decoder = model.get_decoder()
    return next(getattr(decoder, name) for name in _FINAL_NORMS if hasattr(decoder, name))


class BlockOutputs:
    """Records what every block returns in every pass, independently of the package."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.passes: list[dict[int, torch.Tensor]] = []
        self.handles: list[Any] = []

    def __enter__(self) -> BlockOutputs:
        for layer, block in enumerate(self.blocks):
            hook = functools.partial(self._keep, layer=layer)
            self.handles.append(block.register_forward_hook(hook))
        return self

    def __exit__(self, *details: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, _block: nn.Module, _inputs: Any, output: Any, *, layer: int) -> None:
        if layer == 0:
            self.passes.append({})
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        self.passes[-1][layer] = hidden.detach().clone()

    def joined(self, layer: int) -> torch.Tensor:
        """Return the states of all passes one after the other, (batch, tokens, width)."""
        return torch.cat([one[layer] for one in self.passes], dim=1)


STRENGTH = 0.5


def pack_for(model: LanguageModel, layers=(0, 1)) -> SteeringPack:
    """Return a pack of random vectors whose steering changes a tiny model's answers."""
    return SteeringPack(
        vectors={layer: random_vector(layer, 1.0) for layer in layers},
        mean_residual_norms={layer: 6.0 + layer for layer in layers},
        target=model.description,
        strength=STRENGTH,
    )


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def greedy(model, ids: torch.Tensor) -> list[list[int]]:
    with torch.no_grad():
        tokens = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    return tokens[:, ids.shape[1] :].tolist()


def interruptible(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a command that SIGINT stops, also where the tests run in the background of a shell.

    Such a shell has SIGINT ignored, and what is ignored is handed on.
    """

    def obey() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, preexec_fn=obey)


def load_script(path: Path) -> ModuleType:
    """Import a file that is no part of the package: a study, a benchmark, the docs' generator."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations are looked up there
    sys.path.insert(0, str(path.parent))  # as for every script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return all that a folder holds; None stands for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
