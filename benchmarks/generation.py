"""Greedy generation of one text with a steering pack, against the unsteered model.

The same vectors steer the same layers by this package, steering-vectors and repeng, and in the
weights of the checkpoint that `expertsteer export --to weights` writes. Every way writes the same
number of tokens from the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from repeng import ControlModel
from steering_vectors import SteeringVector
from timing import OURS, Case, Goal, main

from expertsteer import LanguageModel, SteeringPack, load_model
from expertsteer.export import export_pack

MODEL = "smollm2-135m-instruct"
N_PARAMETERS = 134_515_008
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


def prepare(n_layers: int, n_tokens: int) -> Mapping[str, Callable[[], Any]]:
    model = load_model(MODEL, dtype="float32")
    assert model.model.num_parameters() == N_PARAMETERS
    n_blocks = len(model.blocks)
    layers = [round((k + 1) * n_blocks / (n_layers + 1)) for k in range(n_layers)]
    pack = make_pack(model, layers)
    added = {j: v * STRENGTH * pack.mean_residual_norms[j] for j, v in pack.vectors.items()}
    inputs = model.tokenizer(PROMPT, return_tensors="pt")

    with TemporaryDirectory() as folder:
        path = Path(folder) / "baked"
        export_pack(pack, path, "weights", strength=STRENGTH, target=model)
        baked = load_model(path, dtype="float32")

    def generate(written_by: LanguageModel = model) -> list[int]:
        settings = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens, "do_sample": False}
        return written_by.model.generate(**inputs, **settings)[0].tolist()

    def with_pack() -> list[int]:
        with pack.apply(model, strength=STRENGTH):
            return generate()

    def with_steering_vectors() -> list[int]:
        with SteeringVector(added).apply(model.model):
            return generate()

    def with_repeng() -> list[int]:
        controlled = ControlModel(model.model, layers)
        controlled.set_raw_control(added)
        try:
            return generate()
        finally:
            controlled.unwrap()

    return {
        OURS: with_pack,
        STEERING_VECTORS: with_steering_vectors,
        REPENG: with_repeng,
        UNSTEERED: generate,
        BAKED: partial(generate, baked),
    }


def compare(returned: dict[str, Any]) -> dict[str, float]:
    found = returned[OURS]
    return {
        f"tokens that {way} writes otherwise": sum(
            a != b for a, b in zip(found, returned[way], strict=True)
        )
        for way in (*PEERS, BAKED, UNSTEERED)
    }


def cases(quick: bool) -> list[Case]:
    n_tokens = 8 if quick else 16
    return [
        Case(
            name=f"{n_layers} layers",
            title=f"{n_tokens} tokens, {n_layers} layer{'s' if n_layers > 1 else ''} steered",
            sizes={"model": MODEL, "dtype": "float32", "tokens": n_tokens, "layers": n_layers},
            prepare=partial(prepare, n_layers, n_tokens),
            goals=(
                Goal(f"ratio {OURS} / {UNSTEERED}", at_most=1.02),
                *(Goal(f"ratio {peer} / {OURS}", at_least=1.0) for peer in PEERS),
                Goal(f"ratio {BAKED} / {UNSTEERED}", at_most=1.005),
            ),
            compare=compare,
            helpers=(UNSTEERED, BAKED),
            # All ways read the same weights, so that they differ by hundredths at most.
            rounds=2 if quick else 41,
            # Every token reads all weights once.
            work={UNSTEERED: ("weights", 4.0 * N_PARAMETERS * n_tokens)},
        )
        for n_layers in ((1,) if quick else (1, 2, 4, 8))
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
