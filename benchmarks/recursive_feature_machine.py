"""Time our recursive feature machine against xrfm and an eigendecomposition.

Both run in turn in one process, in float32, so that a machine whose speed drifts does
not favour either. The directions are compared with those of xrfm in float64 as well, since
its float32 distances between a point and itself are not quite zero and disturb some fits.
Run with: python benchmarks/recursive_feature_machine.py
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from xrfm.rfm_src import RFM

from expertsteer.directions import RecursiveFeatureMachine
from expertsteer.provenance import describe_machine, package_versions

SIZES = ((256, 1024), (512, 4096))
N_ITERATIONS = 5
BANDWIDTH = 10.0
RIDGE = 1e-3


def problem(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, d, generator=generator)
    axis = torch.randn(d, generator=generator) / d**0.5
    noise = 0.3 * torch.randn(n, generator=generator)
    return states, torch.sign(states @ axis + noise)


def ours(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rfm = RecursiveFeatureMachine(bandwidth=BANDWIDTH, ridge=RIDGE, n_iterations=N_ITERATIONS)
    return torch.as_tensor(rfm.fit(states, labels).direction_)


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


def timed(function, *arguments) -> tuple[float, torch.Tensor]:
    begun = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begun, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "recursive_feature_machine.json",
    )
    options = parser.parse_args()
    rows = []
    for n, d in SIZES:
        timed(ours, *problem(n, d, 99))  # warm-up
        runs = []
        for seed in range(options.repeats):
            states, labels = problem(n, d, seed)
            seconds, direction = timed(ours, states, labels)
            oracle_seconds, expected = timed(oracle, states, labels)
            precise = oracle(states.double(), labels.double())
            cosines = [abs(float(direction.double() @ v.double())) for v in (expected, precise)]
            runs.append((seconds, oracle_seconds, *cosines))
        rows.append(
            {
                "n": n,
                "d": d,
                "seconds": median(run[0] for run in runs),
                "xrfm_seconds": median(run[1] for run in runs),
                "ratio": median(run[1] / run[0] for run in runs),
                "ratio_range": [min(r[1] / r[0] for r in runs), max(r[1] / r[0] for r in runs)],
                "lowest_cosine_float32": min(run[2] for run in runs),
                "lowest_cosine_float64": min(run[3] for run in runs),
            }
        )
    result = {
        "machine": describe_machine(),
        "versions": package_versions() | {"xrfm": version("xrfm")},
        "threads": torch.get_num_threads(),
        "iterations": N_ITERATIONS,
        "repeats": options.repeats,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(
        *["n", "d", "ours (s)", "xrfm + eigh (s)", "ratio", "range"],
        *["cosine, xrfm in float32", "in float64"],
    )
    for row in rows:
        low, high = row["ratio_range"]
        table.add_row(
            str(row["n"]),
            str(row["d"]),
            f"{row['seconds']:.3f}",
            f"{row['xrfm_seconds']:.2f}",
            f"{row['ratio']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['lowest_cosine_float32']:.5f}",
            f"{row['lowest_cosine_float64']:.5f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
