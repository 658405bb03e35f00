"""Compare the estimators of mutual information with distributions whose value is known.

The distributions are the suite of Czyz et al. (2023), "Beyond Normal: On the Evaluation of Mutual
Information Estimators". It needs the package ``benchmark-mi``, whose dependencies are older than
those of this one, so it is best installed into an environment of its own::

    python benchmarks/mutual_information_accuracy.py --rows 2000 --seeds 3
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from expertsteer.pairing import ESTIMATORS, mutual_information_table


class Reading(NamedTuple):
    """Estimates of one distribution."""

    name: str
    truth: float
    estimates: dict[str, float]


def read_suite(suite: Mapping[str, Any], rows: int, seeds: int) -> Iterator[Reading]:
    """Estimate every distribution of the suite.

    Parameters
    ----------
    suite : mapping of str to task
        The tasks of ``bmi.benchmark.BENCHMARK_TASKS``.
    rows : int
        Samples drawn from a distribution.
    seeds : int
        Draws to average over.

    Yields
    ------
    Reading
        Mean estimate of every estimator, in nats.
    """
    for task in suite.values():
        samples = [task.sample(rows, seed=seed) for seed in range(seeds)]
        estimates = {
            name: float(np.mean([_estimate(x, y, name) for x, y in samples])) for name in ESTIMATORS
        }
        yield Reading(task.name, float(task.mutual_information), estimates)


def _estimate(x: np.ndarray, y: np.ndarray, estimator: str) -> float:
    table = mutual_information_table(x[:, None, :], y[:, None, :], estimator)
    return float(table[0, 0])


def main() -> None:
    """Print one line a distribution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=2000, help="samples a distribution")
    parser.add_argument("--seeds", type=int, default=3, help="draws to average over")
    arguments = parser.parse_args()
    try:
        suite = importlib.import_module("bmi.benchmark").BENCHMARK_TASKS
    except ImportError as error:
        raise SystemExit(
            f'Got "{error}", but expected the suite. Run: pip install benchmark-mi'
        ) from error
    print(f"{'distribution':58}{'truth':>8}" + "".join(f"{name:>10}" for name in ESTIMATORS))
    for reading in read_suite(suite, arguments.rows, arguments.seeds):
        values = "".join(f"{value:10.3f}" for value in reading.estimates.values())
        print(f"{reading.name:58}{reading.truth:8.3f}{values}")


if __name__ == "__main__":
    main()
