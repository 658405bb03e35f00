"""The whole fit after collecting, at the shapes of 8-billion-parameter models.

32 layers of width 4,096 on both sides and synthetic states: the table of mutual information,
the alignment of the chosen pairs and their directions over the usual bandwidths. One pair, and
six, which is how many candidates the strategy "validated" fits for one layer pair. That
strategy's own choice, by steering the target, is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from synthetic import layered_states
from timing import OURS, Case, Goal, main

from expertsteer import ExpertSteer, SteeringPack
from expertsteer.data import LabelledExamples
from expertsteer.models import ModelDescription
from expertsteer.pipeline import render_corpus
from expertsteer.states import States, StatesDescription, corpus_fingerprint


def examples_of(n: int) -> LabelledExamples:
    names = tuple(f"text {row}" for row in range(n))
    splits = tuple("validation" if row % 10 > 7 else "train" for row in range(n))
    return LabelledExamples(("",) * n, names, np.tile([1, -1], n // 2), splits, names)


def states_of(name: str, examples: LabelledExamples, values: torch.Tensor) -> States:
    n, n_layers, width = values.shape
    corpus = corpus_fingerprint(render_corpus(examples))
    model = ModelDescription(name, None, "synthetic", n_layers, width, 1, "0" * 16)
    layers = tuple(range(n_layers))
    return States(values, StatesDescription(model, corpus, corpus, n, layers, "last", "float32"))


def prepare(n: int, n_layers: int, d: int, n_pairs: int) -> Mapping[str, Callable[[], Any]]:
    examples = examples_of(n)
    labels = torch.from_numpy(np.asarray(examples.labels, dtype="float32"))
    sides = []
    for seed, name in ((1, "target"), (2, "expert")):
        values = layered_states(n, n_layers, d, seed)
        # A direction to be found in every layer, three times as long as the states spread there.
        generator = torch.Generator().manual_seed(100 + seed)
        directions = torch.nn.functional.normalize(
            torch.randn(n_layers, d, generator=generator), dim=1
        )
        spread = (values @ directions[0]).std()
        values += 3 * spread * labels[:, None, None] * directions
        sides.append(states_of(name, examples, values))
    steer = ExpertSteer(strategy="highest_mi", n_pairs=n_pairs)
    return {OURS: partial(steer.fit, *sides, examples, progress=False)}


def compare(returned: dict[str, Any]) -> dict[str, float]:
    pack: SteeringPack = returned[OURS]
    return {"least validation AUC": min(pair.auc or 0.0 for pair in pack.pairs)}


def cases(quick: bool) -> list[Case]:
    n, n_layers, d = (100, 4, 256) if quick else (1000, 32, 4096)
    return [
        Case(
            name=f"{n_pairs} of {n_layers} x {n_layers}",
            title=f"Fit after collecting, {n_pairs} pair{'s' if n_pairs > 1 else ''}",
            sizes={"n": n, "layers": n_layers, "d": d, "pairs": n_pairs},
            prepare=partial(prepare, n, n_layers, d, n_pairs),
            goals=(
                Goal(f"seconds {OURS}", at_most=30),
                Goal(f"peak_mib {OURS}", at_most=4096),
                Goal("least validation AUC", at_least=0.9),
            ),
            compare=compare,
        )
        for n_pairs in ((1, 2) if quick else (1, 6))
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
