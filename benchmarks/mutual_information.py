"""The table of mutual information between all layers of two models.

Ours takes the states and does all of it. The peers get our principal components for free. They
estimate the information of scalars, so a loop over them takes every pair of components of a
cell; one cell is timed and multiplied. They are timed as well where the canonical pairs are
handed to them, which is a step of our own method and leaves them 8 estimates a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from ennemi import estimate_mi
from sklearn.feature_selection import mutual_info_regression
from synthetic import layered_states
from timing import OURS, Case, Goal, main

from expertsteer.pairing import mutual_information_table
from expertsteer.pairing.canonical import MAX_PAIRS
from expertsteer.pairing.projection import (
    OVERSAMPLING,
    POWER_ITERATIONS,
    resolve_n_components,
    whiten_layers,
)

N_NEIGHBORS = 3
NEAREST = "expertsteer, nearest neighbours"
CANONICAL = ", our canonical pairs"

Pair = tuple[np.ndarray, np.ndarray]


def canonical_pairs(x: torch.Tensor, y: torch.Tensor) -> list[Pair]:
    left, _, right = torch.linalg.svd(x.T @ y, full_matrices=False)
    a, b = (x @ left).numpy(), (y @ right.T).numpy()
    return [(a[:, k : k + 1], b[:, k]) for k in range(MAX_PAIRS)]


def component_pairs(x: torch.Tensor, y: torch.Tensor) -> list[Pair]:
    """Return all components of one side with each of the other's: both peers take such."""
    return [(x.numpy(), column.numpy()) for column in y.T]


def with_scikit_learn(pairs: list[Pair]) -> float:
    found = [mutual_info_regression(a, b, n_neighbors=N_NEIGHBORS).sum() for a, b in pairs]
    return float(sum(found))


def with_ennemi(pairs: list[Pair]) -> float:
    found = [estimate_mi(b, a, k=N_NEIGHBORS, preprocess=False).sum() for a, b in pairs]
    return float(sum(found))


def prepare(n: int, n_layers: int, d: int, timed: int) -> Mapping[str, Callable[[], Any]]:
    expert, target = (layered_states(n, n_layers, d, seed) for seed in (1, 2))
    most = resolve_n_components(None, n)
    x, y = (whiten_layers("states", states[:, :timed], most).scores for states in (expert, target))
    components = component_pairs(x[0], y[0])
    canonical = [pair for layer in y for pair in canonical_pairs(x[0], layer)]
    table = partial(mutual_information_table, expert, target)
    return {
        OURS: table,
        NEAREST: partial(table, "ksg", n_neighbors=N_NEIGHBORS),
        "scikit-learn": partial(with_scikit_learn, components),
        "ennemi": partial(with_ennemi, components),
        f"scikit-learn{CANONICAL}": partial(with_scikit_learn, canonical),
        f"ennemi{CANONICAL}": partial(with_ennemi, canonical),
    }


def cases(quick: bool) -> list[Case]:
    n, n_layers, d = (200, 4, 256) if quick else (1000, 32, 4096)
    timed = min(n_layers, 16)
    handed = (f"scikit-learn{CANONICAL}", f"ennemi{CANONICAL}")
    size = resolve_n_components(None, n) + OVERSAMPLING
    range_finders = 2 * n_layers * (2 + 2 * POWER_ITERATIONS) * 2.0 * n * d * size
    return [
        Case(
            name="table",
            title=f"MI table, {n_layers} × {n_layers} layers",
            sizes={"n": n, "d": d, "cells timed": [1, timed]},
            prepare=partial(prepare, n, n_layers, d, timed),
            goals=(
                Goal(f"seconds {OURS}", at_most=10),
                Goal(f"ratio best / {OURS}", at_least=50),
                Goal(f"ratio scikit-learn{CANONICAL} / {NEAREST}", at_least=1),
            ),
            scale=dict.fromkeys(("scikit-learn", "ennemi"), n_layers**2)
            | dict.fromkeys(handed, n_layers**2 / timed),
            helpers=(NEAREST, *handed),
            work={OURS: ("float32", range_finders)},
        )
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
