"""Greedy generation of one text with a steering pack, against the unsteered model.

The same vectors steer the same layers by this package, steering-vectors and repeng, and in the
weights of the checkpoint that `expertsteer export --to weights` writes. Every way writes texts of
the same number of tokens from the same prompt, and they take turns at every token.
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
from transformers import LogitsProcessorList

from expertsteer import LanguageModel, SteeringPack, load_model
from expertsteer.export import export_pack

MODEL = "smollm2-135m-instruct"
N_PARAMETERS = 134_515_008
PROMPT = "My neighbour told me that her holiday was"
STEERING_VECTORS = "steering-vectors"
REPENG = "repeng"
PEERS = (STEERING_VECTORS, REPENG)
UNSTEERED = "unsteered"
# The same work: what tells the two apart is where their weights lie in memory.
SECOND = "unsteered, a second copy"
BAKED = "baked into the weights"
MAPPED = "baked into the weights, mapped to the file"
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
    machine's speed drifts by more, from second to second, than what is to be told apart.

    Parameters
    ----------
    model : str or Path
        Loaded at the first call.
    write : callable
        Generates with the model and the logits processors that it is given.
    mapped : bool, default False
        Leave the weights where loading puts them: in the pages of the file where that has the
        dtype asked for. Every other way has a copy of its own in memory, since of shared weights
        the processor's cache would hold a part for the way that comes next.
    """

    def __init__(
        self,
        model: str | Path,
        write: Callable[[Any, LogitsProcessorList], None],
        mapped: bool = False,
    ) -> None:
        self._name = model
        self._write = write
        self._mapped = mapped
        self._model: Any = None
        self._writing: greenlet | None = None

    def __call__(self) -> list[int]:
        """Write a token; return the text before it."""
        if self._model is None:
            self._model = load_model(self._name, dtype="float32").model
            if not self._mapped:
                for parameter in self._model.parameters():
                    parameter.data = parameter.data.clone()
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


def prepare(n_layers: int, n_tokens: int) -> Mapping[str, Callable[[], Any]]:
    # For good: ways that take turns would otherwise restore each other's setting.
    torch.set_grad_enabled(False)
    model = load_model(MODEL, dtype="float32")
    assert model.model.num_parameters() == N_PARAMETERS
    n_blocks = len(model.blocks)
    layers = [round((k + 1) * n_blocks / (n_layers + 1)) for k in range(n_layers)]
    pack = make_pack(model, layers)
    added = {j: v * STRENGTH * pack.mean_residual_norms[j] for j, v in pack.vectors.items()}
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    baked = Path(FOLDER.name) / f"{n_layers}"
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

    return {
        OURS: TokenByToken(MODEL, with_pack),
        STEERING_VECTORS: TokenByToken(MODEL, with_steering_vectors),
        REPENG: TokenByToken(MODEL, with_repeng),
        UNSTEERED: TokenByToken(MODEL, unsteered),
        SECOND: TokenByToken(MODEL, unsteered),
        BAKED: TokenByToken(baked, unsteered),
        MAPPED: TokenByToken(baked, unsteered, mapped=True),
    }


def compare(returned: dict[str, Any]) -> dict[str, float]:
    found = returned[OURS]
    return {
        f"tokens that {way} writes otherwise": sum(
            a != b for a, b in zip(found, returned[way], strict=True)
        )
        for way in (*PEERS, BAKED, MAPPED, UNSTEERED, SECOND)
    }


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case(1, 8, 1)]
    return [case(n_layers, 16, 25) for n_layers in (1, 2, 4, 8)]


def case(n_layers: int, n_tokens: int, n_texts: int) -> Case:
    return Case(
        name=f"{n_layers} layers",
        title=f"A token, {n_layers} layer{'s' if n_layers > 1 else ''} steered",
        sizes={
            "model": MODEL,
            "dtype": "float32",
            "texts": n_texts,
            "tokens": n_tokens,
            "layers": n_layers,
        },
        prepare=partial(prepare, n_layers, n_tokens),
        goals=(
            Goal(f"ratio {OURS} / {UNSTEERED}", at_most=1.02),
            *(Goal(f"ratio {peer} / {OURS}", at_least=1.0) for peer in PEERS),
            Goal(f"ratio {BAKED} / {UNSTEERED}", at_most=1.005),
        ),
        compare=compare,
        helpers=(UNSTEERED, SECOND, BAKED, MAPPED),
        # The first is not timed.
        rounds=n_tokens * n_texts - 1,
        # Every token reads all weights once.
        work={UNSTEERED: ("weights", 4.0 * N_PARAMETERS)},
    )


if __name__ == "__main__":
    main(__file__, __doc__, cases)
