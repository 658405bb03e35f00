"""Recursive feature machines with the top vector, against xrfm and an eigendecomposition.

One problem, and 28 of them as for the layers of one model. All in float32. The directions are
compared with those of xrfm in float64 too, since its float32 distances between a point and
itself are not quite zero and disturb some fits.

On a CPU our layers are trained one after the other, as `fit_layers` decides; what one batch of
all would take is measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from timing import OURS, Case, Goal, main
from xrfm.rfm_src import RFM

from expertsteer.directions import RecursiveFeatureMachine
from expertsteer.directions import recursive_feature_machine as machines

N_ITERATIONS = 5
BANDWIDTH = 10.0
RIDGE = 1e-3
PEER = "xrfm and eigh"
IN_ONE_BATCH = "expertsteer, all layers in one batch"
COSINE = "least |cosine| with xrfm in float64"

Problem = tuple[torch.Tensor, torch.Tensor]


def problem(n: int, d: int, count: int) -> Problem:
    """Return the states of some layers, (n, count, d), and the labels of their texts."""
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(n, generator=generator)
    labels = torch.sign(said + 0.3 * torch.randn(n, generator=generator))
    layers = []
    for seed in range(1, count + 1):
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(n, d, generator=generator)
        axis = torch.randn(d, generator=generator)
        axis /= axis.norm()
        # Along its axis a layer has what is said, so that all layers have the same labels.
        layers.append(states + (said - states @ axis)[:, None] * axis)
    return torch.stack(layers, dim=1), labels


def ours(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rfm = RecursiveFeatureMachine(
        bandwidth=BANDWIDTH, bandwidth_mode="constant", ridge=RIDGE, n_iterations=N_ITERATIONS
    )
    return torch.stack([torch.as_tensor(m.direction_) for m in rfm.fit_layers(states, labels)])


def in_one_batch(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with mock.patch.object(machines, "_layers_at_once", lambda states, n_kept: len(states)):
        return ours(states, labels)


def oracle(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    centred = (labels - labels.mean())[:, None]
    model = RFM(kernel="l2_high_dim", bandwidth=BANDWIDTH, device="cpu", verbose=False)
    model.fit(
        (states, centred),
        (states[:32], centred[:32]),
        iters=N_ITERATIONS,
        method="cholesky",
        reg=RIDGE,
        get_agop_best_model=True,
        return_best_params=False,
        early_stop_rfm=False,
    )
    return torch.linalg.eigh(model.agop_best_model)[1][:, -1]


def peer(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([oracle(layer, labels) for layer in states.unbind(1)])


def prepare(n: int, d: int, count: int, timed: int) -> Mapping[str, Callable[[], Any]]:
    states, labels = problem(n, d, count)
    # The first layers stand for all: they are of one size.
    ways = {OURS: partial(ours, states, labels), PEER: partial(peer, states[:, :timed], labels)}
    return ways | ({IN_ONE_BATCH: partial(in_one_batch, states, labels)} if count > 1 else {})


def compare(n: int, d: int, count: int, returned: dict[str, Any]) -> dict[str, float]:
    single = returned[PEER].double()
    found = returned[OURS][: len(single)].double()
    states, labels = problem(n, d, count)
    exact = peer(states[:, : len(single)].double(), labels.double())
    return {
        "least |cosine| with xrfm in float32": float((found * single).sum(1).abs().min()),
        COSINE: float((found * exact).sum(1).abs().min()),
    }


def cases(quick: bool) -> list[Case]:
    n, d = (128, 512) if quick else (512, 4096)
    many = 4 if quick else 28
    return [
        Case(
            name=layers,
            title=f"RFM, {layers}",
            sizes={"n": n, "d": d, "iterations": N_ITERATIONS, "layers timed of xrfm": timed},
            prepare=partial(prepare, n, d, count, timed),
            goals=(
                Goal(f"ratio {PEER} / {OURS}", at_least=20),
                Goal(COSINE, at_least=0.999),
            ),
            compare=partial(compare, n, d, count),
            helpers=(IN_ONE_BATCH,) if count > 1 else (),
            scale={PEER: count / timed} if count > timed else {},
            # The Gram matrix, and the diagonal of G^T G every round.
            work={OURS: ("float32", count * 2.0 * (N_ITERATIONS + 0.625) * n * n * d)},
        )
        for layers, count, timed in (("1 layer", 1, 1), (f"{many} layers", many, min(many, 4)))
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
