"""The memory of collecting: the same for 100 texts as for 100,000.

A small model with random weights, so that 100,000 texts take minutes. States go to a folder
(``save_to``) and are not looked at afterwards, as with ``expertsteer collect``. Each number of
texts runs in a process of its own; the figure is the most memory the process ever held, less
what it held when model and texts were ready.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import OURS, Case, Goal, main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expertsteer import collect_states
from expertsteer.models import LanguageModel

N_LAYERS, WIDTH, VOCABULARY = 8, 256, 1000
# Of states and batches; half of the states of 100,000 texts.
MOST_MIB = 400.0


def small_model() -> LanguageModel:
    words = {word: n for n, word in enumerate(["<pad>", "<unk>", *map(str, range(VOCABULARY - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        pad_token_id=0,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    return LanguageModel(LlamaForCausalLM(config).eval(), fast, "small random model")


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    words = [str(word) for word in range(VOCABULARY - 2)]
    return [" ".join(rng.choices(words, k=rng.randint(4, 32))) for _ in range(n)]


def collect(model: LanguageModel, texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        collect_states(model, texts, save_to=Path(folder), progress=False)


def prepare(n: int) -> Mapping[str, Callable[[], Any]]:
    return {OURS: partial(collect, small_model(), random_texts(n))}


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            name=f"{n} texts",
            title=f"Memory of collecting {n:,} texts",
            sizes={
                "texts": n,
                "layers": N_LAYERS,
                "width": WIDTH,
                "states (MiB)": round(n * N_LAYERS * WIDTH * 4 / 2**20),
            },
            prepare=partial(prepare, n),
            goals=(Goal(f"more_mib {OURS}", at_most=MOST_MIB),),
            # The memory is the figure, and the largest takes minutes.
            fixed={OURS: 1} if n == 100_000 else {},
        )
        for n in ((100, 1000) if quick else (100, 1000, 10_000, 100_000))
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
