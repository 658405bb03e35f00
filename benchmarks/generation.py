"""Greedy generation of one text with a steering pack, against the unsteered model.

The same vectors steer the same layers by this package, steering-vectors and repeng, and in the
weights of the checkpoint that `expertsteer export --to weights` writes. Every way writes texts of
the same number of tokens from the same prompt, and they take turns at every token. A model of
random weights shows what is left of the differences where the weights are eight times as many;
there is no room for a copy for each peer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from greenlet import greenlet
from repeng import ControlModel
from steering_vectors import SteeringVector
from timing import OURS, Case, Goal, main
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessorList

from expertsteer import LanguageModel, SteeringPack, load_model
from expertsteer.export import export_pack

MODEL = "smollm2-135m-instruct"
N_PARAMETERS = 134_515_008
# The shape of TinyLlama.
LARGE = LlamaConfig(
    hidden_size=2048,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    intermediate_size=5632,
    vocab_size=32000,
    tie_word_embeddings=False,
)
N_LARGE_PARAMETERS = 1_100_048_384
PROMPT = "My neighbour told me that her holiday was"
STEERING_VECTORS = "steering-vectors"
REPENG = "repeng"
PEERS = (STEERING_VECTORS, REPENG)
UNSTEERED = "unsteered"
BAKED = "baked into the weights"
STRENGTH = 0.5


def make_pack(model: LanguageModel, layers: list[int]) -> SteeringPack:
    """Return random vectors of a usual length: what they say does not change the time."""
    generator = torch.Generator().manual_seed(0)
    width = model.description.width
    vectors = {layer: torch.randn(width, generator=generator) for layer in layers}
    return SteeringPack(
        vectors={layer: vector / vector.norm() for layer, vector in vectors.items()},
        mean_residual_norms=dict.fromkeys(layers, 100.0),
        target=model.description,
    )


class TokenByToken:
    """A way to generate that writes one token a call, and begins the text anew at its end.

    Ways that take turns at every token differ in what they do and not in when they do it: the
    machine's speed drifts by more, from second to second, than what is to be told apart. Every
    way has weights of its own in memory, since of shared ones the processor's cache would hold a
    part for the way that comes next.

    Parameters
    ----------
    model : str or Path
        Loaded at the first call.
    write : callable
        Generates with the model and the logits processors that it is given.
    """

    def __init__(
        self, model: str | Path, write: Callable[[Any, LogitsProcessorList], None]
    ) -> None:
        self._name = model
        self._write = write
        self._model: Any = None
        self._writing: greenlet | None = None

    def __call__(self) -> list[int]:
        """Write a token; return the text before it."""
        if self._model is None:
            self._model = load_model(self._name, dtype="float32").model
        if self._writing is not None:
            written = self._writing.switch()
            if not self._writing.dead:
                return written
        processors = LogitsProcessorList([self._pause])
        self._writing = greenlet(partial(self._write, self._model, processors))
        return self._writing.switch()

    def _pause(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._writing.parent.switch(ids[0].tolist())
        return scores


# The weights of every case's checkpoint stay until the process ends.
FOLDER = TemporaryDirectory()


def large_model() -> Path:
    """Write a checkpoint of `LARGE`, with random weights, and return its folder."""
    folder = Path(FOLDER.name) / "large"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LARGE, dtype=torch.float32).save_pretrained(folder)
    # Token ids beyond the vocabulary are none of the prompt's.
    load_model(MODEL).tokenizer.save_pretrained(folder)
    return folder


def prepare(n_layers: int, n_tokens: int, large: bool) -> Mapping[str, Callable[[], Any]]:
    # For good: ways that take turns would otherwise restore each other's setting.
    torch.set_grad_enabled(False)
    name: str | Path = large_model() if large else MODEL
    model = load_model(name, dtype="float32")
    assert model.model.num_parameters() == (N_LARGE_PARAMETERS if large else N_PARAMETERS)
    n_blocks = len(model.blocks)
    layers = [round((k + 1) * n_blocks / (n_layers + 1)) for k in range(n_layers)]
    pack = make_pack(model, layers)
    added = {j: v * STRENGTH * pack.mean_residual_norms[j] for j, v in pack.vectors.items()}
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    baked = Path(FOLDER.name) / f"{n_layers}{' large' if large else ''}"
    export_pack(pack, baked, "weights", strength=STRENGTH, target=model)

    def unsteered(model: Any, processors: LogitsProcessorList) -> None:
        settings = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens, "do_sample": False}
        model.generate(**inputs, **settings, logits_processor=processors)

    def with_pack(model: Any, processors: LogitsProcessorList) -> None:
        with pack.apply(model, strength=STRENGTH):
            unsteered(model, processors)

    def with_steering_vectors(model: Any, processors: LogitsProcessorList) -> None:
        with SteeringVector(added).apply(model):
            unsteered(model, processors)

    def with_repeng(model: Any, processors: LogitsProcessorList) -> None:
        controlled = ControlModel(model, layers)
        controlled.set_raw_control(added)
        try:
            unsteered(model, processors)
        finally:
            controlled.unwrap()

    peers = {
        STEERING_VECTORS: TokenByToken(name, with_steering_vectors),
        REPENG: TokenByToken(name, with_repeng),
    }
    return {
        OURS: TokenByToken(name, with_pack),
        **({} if large else peers),
        UNSTEERED: TokenByToken(name, unsteered),
        BAKED: TokenByToken(baked, unsteered),
    }


def compare(returned: dict[str, Any]) -> dict[str, float]:
    found = returned[OURS]
    return {
        f"tokens that {way} writes otherwise": sum(
            a != b for a, b in zip(found, returned[way], strict=True)
        )
        for way in (*PEERS, BAKED, UNSTEERED)
        if way in returned
    }


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case(1, 8, 1)]
    return [*(case(n_layers, 16, 25) for n_layers in (1, 2, 4, 8)), case(4, 16, 10, large=True)]


def case(n_layers: int, n_tokens: int, n_texts: int, large: bool = False) -> Case:
    steered = f"{n_layers} layer{'s' if n_layers > 1 else ''} steered"
    return Case(
        name=f"{n_layers} layers{', 1.1B' if large else ''}",
        title=f"A token{' of 1.1B parameters' if large else ''}, {steered}",
        sizes={
            "model": "random weights, the shape of TinyLlama 1.1B" if large else MODEL,
            "dtype": "float32",
            "texts": n_texts,
            "tokens": n_tokens,
            "layers": n_layers,
        },
        prepare=partial(prepare, n_layers, n_tokens, large),
        goals=(
            Goal(f"ratio {OURS} / {UNSTEERED}", at_most=1.02),
            *(Goal(f"ratio {peer} / {OURS}", at_least=1.0) for peer in (() if large else PEERS)),
            Goal(f"ratio {BAKED} / {UNSTEERED}", at_most=1.005),
        ),
        compare=compare,
        helpers=(UNSTEERED, BAKED),
        # The first is not timed.
        rounds=n_tokens * n_texts - 1,
        # Every token reads all weights once.
        work={UNSTEERED: ("weights", 4.0 * (N_LARGE_PARAMETERS if large else N_PARAMETERS))},
    )


if __name__ == "__main__":
    main(__file__, __doc__, cases)
