"""Align one pair of layers: the closed form against gradient descent to the same loss.

Both solve ridge regression of the target's states on the expert's, with the strength that
ours found. Gradient descent is Adam on all rows, as in a training loop; of the rates
tried, the one counts that gets furthest in the first steps. It stops within 1 % of our
loss or after a number of steps; where it stopped short, the loss it reached is shown and its
time is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from synthetic import layered_states
from timing import OURS, Case, Goal, main

from expertsteer.alignment import Ridge

PEER = "gradient descent"
WITHIN = 1.01
LEARNING_RATES = (1e-2, 1e-3, 1e-4)
TRIAL_STEPS = 10


def objective(
    weight: torch.Tensor, expert: torch.Tensor, target: torch.Tensor, strength: float
) -> torch.Tensor:
    return (expert @ weight - target).square().sum() + strength * weight.square().sum()


def ours(expert: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fit with held-out measurements, and the choice of the strength."""
    return torch.as_tensor(Ridge().fit(expert, target).encoder_weight_)


def descend(
    expert: torch.Tensor,
    target: torch.Tensor,
    strength: float,
    loss_wanted: float,
    learning_rate: float,
    most_steps: int,
) -> tuple[float, int]:
    weight = torch.zeros(expert.shape[1], target.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=learning_rate)
    loss, step = float("inf"), 0
    for step in range(1, most_steps + 1):  # noqa: B007 - how many there were is a result
        optimizer.zero_grad(set_to_none=True)
        value = objective(weight, expert, target, strength)
        value.backward()
        optimizer.step()
        loss = float(value.detach())
        if loss <= WITHIN * loss_wanted:
            break
    return loss / loss_wanted, step


def prepare(n: int, d: int, most_steps: int) -> Mapping[str, Callable[[], Any]]:
    expert, target = (layered_states(n, 1, d, seed)[:, 0] for seed in (1, 2))
    fitted = Ridge().fit(expert, target)
    x, y = expert - expert.mean(0), target - target.mean(0)
    strength = fitted.ridge_ * float(x.square().sum()) / (n - 1)
    wanted = float(objective(torch.as_tensor(fitted.encoder_weight_), x, y, strength))
    run = partial(descend, x, y, strength, wanted)
    best = min(LEARNING_RATES, key=lambda rate: run(rate, TRIAL_STEPS)[0])
    return {OURS: partial(ours, expert, target), PEER: partial(run, best, most_steps)}


def compare(returned: dict[str, Any]) -> dict[str, float]:
    loss, steps = returned[PEER]
    return {"loss of gradient descent / closed form": loss, "steps of gradient descent": steps}


def cases(quick: bool) -> list[Case]:
    n, d, most_steps = (100, 256, 200) if quick else (1000, 4096, 250)
    return [
        Case(
            name="one pair",
            title=f"Alignment of one pair, {d:,} → {d:,}",
            sizes={"n": n, "d": d, "most steps": most_steps, "loss within": WITHIN},
            prepare=partial(prepare, n, d, most_steps),
            goals=(Goal(f"ratio {PEER} / {OURS}", at_least=50),),
            compare=compare,
            # Minutes a round.
            fixed={PEER: 2 if quick else 5},
            # The product with the width squared: the encoder's weight.
            work={OURS: ("float32", 2.0 * n * d * d)},
        )
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
