"""Collect the states of all layers at the last token of texts of mixed length.

Against transformers with ``output_hidden_states=True`` on padded batches, and against what
steering-vectors and repeng collect their vectors from. All run the same loaded model in
float32. The peers read a twentieth of the texts, of all lengths, and their time is multiplied by
twenty.

The bare forward pass runs the decoder blocks, up to the last one wanted, on ready batches of the
same tokens as ours, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from repeng.extract import batched_get_hiddens
from steering_vectors.train_steering_vector import extract_activations
from texts import WORDS, mixed_texts
from timing import OURS, Case, Goal, main

from expertsteer import collect_states, load_model
from expertsteer.models import LanguageModel

# What repeng takes by default; the others have none, or read texts one by one.
BATCH_SIZE = 32
SHARE = 20
N_TEXTS = 2000
GOALS = {"gemma-3-270m": 5.0, "smollm2-135m-instruct": 2.5}
# Parameters of the blocks, and tokens of the texts.
SIZES = {"gemma-3-270m": (100_325_376, 52_875), "smollm2-135m-instruct": (106_202_880, 52_121)}
MIDDLE = "smollm2-135m-instruct"
BARE = "bare forward pass"


def ours(model: LanguageModel, texts: list[str], layers: Sequence[int] | None = None) -> np.ndarray:
    return collect_states(model, texts, layers=layers, progress=False).values.numpy()


def bare(model: LanguageModel, ready: list[torch.Tensor]) -> None:
    for ids in ready:
        with torch.inference_mode():
            model.model.get_decoder()(input_ids=ids, use_cache=False)


def transformers_way(model: LanguageModel, texts: list[str]) -> np.ndarray:
    """Pad, run, take the last real token, as the documentation of transformers shows."""
    rows = []
    for begin in range(0, len(texts), BATCH_SIZE):
        batch = model.tokenizer(
            texts[begin : begin + BATCH_SIZE], padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model.model(**batch, output_hidden_states=True).hidden_states
        last = batch["attention_mask"].cumsum(1).argmax(1)
        places = torch.arange(len(last))
        rows.append(torch.stack([layer[places, last] for layer in hidden[1:]], dim=1))
    return torch.cat(rows).numpy()


def steering_vectors_way(model: LanguageModel, texts: list[str], batch_size: int) -> np.ndarray:
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    sides = extract_activations(model.model, model.tokenizer, pairs, batch_size=batch_size)
    stacks = [torch.stack([torch.cat(side[j]) for j in sorted(side)], dim=1) for side in sides]
    return torch.stack(stacks, dim=1).flatten(0, 1).numpy()


def repeng_way(model: LanguageModel, texts: list[str]) -> np.ndarray:
    layers = list(range(len(model.blocks)))
    found = batched_get_hiddens(model.model, model.tokenizer, texts, layers, BATCH_SIZE)
    return np.stack([found[layer] for layer in layers], axis=1)


def batches_of(model: LanguageModel, texts: list[str]) -> list[torch.Tensor]:
    """Return the batches of token ids that our way runs."""
    ready: list[torch.Tensor] = []
    hook = model.model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: ready.append(kwargs["input_ids"]), with_kwargs=True
    )
    collect_states(model, texts, layers=[0], progress=False)
    hook.remove()
    return ready


def share_of(texts: list[str]) -> list[int]:
    """Return which texts the peers read: of every length, in their random order."""
    by_length = sorted(range(len(texts)), key=lambda n: len(texts[n].split()))
    return sorted(by_length[SHARE // 2 :: SHARE])


def prepare(name: str, n: int) -> Mapping[str, Callable[[], Any]]:
    model = load_model(name, dtype="float32")
    n_parameters = sum(p.numel() for block in model.blocks for p in block.parameters())
    assert n_parameters == SIZES[name][0]
    texts = mixed_texts(n)
    few = [texts[place] for place in share_of(texts)]
    several = f"steering-vectors, batches of {BATCH_SIZE}"
    return {
        OURS: partial(ours, model, texts),
        "transformers": partial(transformers_way, model, few),
        "steering-vectors": partial(steering_vectors_way, model, few, 1),
        several: partial(steering_vectors_way, model, few, BATCH_SIZE // 2),
        "repeng": partial(repeng_way, model, few),
        BARE: partial(bare, model, batches_of(model, texts)),
    }


def prepare_middle(n: int) -> Mapping[str, Callable[[], Any]]:
    model, cut = (load_model(MIDDLE, dtype="float32") for _ in range(2))
    last = len(model.blocks) // 2
    decoder = cut.model.get_decoder()
    decoder.layers = decoder.layers[: last + 1]
    texts = mixed_texts(n)
    return {
        OURS: partial(ours, model, texts, [last]),
        BARE: partial(bare, cut, batches_of(model, texts)),
    }


def compare(n: int, returned: dict[str, Any]) -> dict[str, float]:
    """Return the largest relative difference of a state, the blocks before the last.

    What transformers calls the last hidden state has passed the final norm.
    """
    found = returned[OURS][share_of(mixed_texts(n)), :-1]
    largest = 0.0
    for way in ("transformers", "steering-vectors", "repeng"):
        difference = np.linalg.norm(returned[way][:, :-1] - found, axis=-1)
        largest = max(largest, float((difference / np.linalg.norm(found, axis=-1)).max()))
    return {"largest relative difference of a state": largest}


def cases(quick: bool) -> list[Case]:
    n = 80 if quick else N_TEXTS
    names = ["smollm2-135m-instruct"] if quick else list(GOALS)
    several = f"steering-vectors, batches of {BATCH_SIZE}"
    return [
        Case(
            name=name,
            title=f"States of {n:,} texts, all layers, `{name}`",
            sizes={"texts": n, "words": WORDS, "dtype": "float32", "peers read": n // SHARE},
            prepare=partial(prepare, name, n),
            goals=(
                Goal(f"ratio best / {OURS}", at_least=GOALS[name]),
                Goal(f"ratio {OURS} / {BARE}", at_most=1.1),
                Goal("largest relative difference of a state", at_most=1e-3),
            ),
            compare=partial(compare, n),
            scale=dict.fromkeys(("transformers", "steering-vectors", several, "repeng"), SHARE),
            helpers=(BARE,),
            work={} if quick else {OURS: ("float32", 2.0 * prod(SIZES[name]))},
        )
        for name in names
    ] + [
        Case(
            name="middle",
            title=f"States of {n // 4:,} texts, the middle layer, `{MIDDLE}`",
            sizes={"texts": n // 4, "words": WORDS, "dtype": "float32"},
            prepare=partial(prepare_middle, n // 4),
            goals=(Goal(f"ratio {OURS} / {BARE}", at_most=1.1),),
            helpers=(BARE,),
        )
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
