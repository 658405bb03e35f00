"""Recursive feature machines with the top vector, against xrfm and an eigendecomposition.

One problem, and 28 of them as for the layers of one model. All in float32. The directions are
compared with those of xrfm in float64 as well, since its float32 distances between a point and
itself are not quite zero and disturb some fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timing import OURS, Case, Goal, main
from xrfm.rfm_src import RFM

from expertsteer.directions import RecursiveFeatureMachine

N_ITERATIONS = 5
BANDWIDTH = 10.0
RIDGE = 1e-3
PEER = "xrfm and eigh"
COSINE = "|cosine| with xrfm in float64"

Problem = tuple[torch.Tensor, torch.Tensor]


def problem(n: int, d: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, d, generator=generator)
    axis = torch.randn(d, generator=generator) / d**0.5
    noise = 0.3 * torch.randn(n, generator=generator)
    return states, torch.sign(states @ axis + noise)


def ours(problems: list[Problem]) -> torch.Tensor:
    rfm = RecursiveFeatureMachine(
        bandwidth=BANDWIDTH, bandwidth_mode="constant", ridge=RIDGE, n_iterations=N_ITERATIONS
    )
    return torch.stack([torch.as_tensor(rfm.fit(x, y).direction_) for x, y in problems])


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


def peer(problems: list[Problem]) -> torch.Tensor:
    return torch.stack([oracle(x, y) for x, y in problems])


def prepare(n: int, d: int, count: int, timed: int) -> Mapping[str, Callable[[], Any]]:
    problems = [problem(n, d, seed) for seed in range(count)]
    # The first layers stand for all: they are of one size.
    return {OURS: partial(ours, problems), PEER: partial(peer, problems[:timed])}


def compare(n: int, d: int, returned: dict[str, Any]) -> dict[str, float]:
    single = returned[PEER].double()
    found = returned[OURS][: len(single)].double()
    states, labels = problem(n, d, 0)
    exact = oracle(states.double(), labels.double())
    return {
        "least |cosine| with xrfm in float32": float((found * single).sum(1).abs().min()),
        COSINE: float((found[0] @ exact).abs()),
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
            compare=partial(compare, n, d),
            scale={PEER: count / timed} if count > timed else {},
            # The Gram matrix, and the diagonal of G^T G every round.
            work={OURS: ("float32", count * 2.0 * (N_ITERATIONS + 1) * n * n * d)},
        )
        for layers, count, timed in (("1 layer", 1, 1), (f"{many} layers", many, min(many, 4)))
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
