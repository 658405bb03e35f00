"""What this machine reaches, and where the time of a whole fit goes.

The reach: see ``reach.py``; every other benchmark measures it in turn with its own work as well.
The fit: from the names of two small models to a pack, with the time of each step.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any
from unittest import mock

from reach import KINDS, reach
from timing import OURS, Case, main

from expertsteer import ExpertSteer, load_examples
from expertsteer import pipeline as steps
from expertsteer.alignment import Alignment
from expertsteer.data.shipped import shipped_file

TARGET, EXPERT = "gemma-3-270m", "smollm2-135m-instruct"
# What the page calls a step, and the function of the pipeline.
STEPS = {
    "load the models": (steps, "load_model"),
    "collect states": (steps, "collect_states"),
    "mutual information": (steps, "information_between"),
    "alignment": (Alignment, "fit"),
    "directions": (steps, "fit_directions"),
    "choose pairs by the target's preference": (steps, "choose_by_preference"),
}


def all_reaches(n: int) -> Mapping[str, Callable[[], Any]]:
    return {kind: reach(kind, n).run for kind in KINDS}


def profiled_fit(n: int | None) -> dict[str, float]:
    """Return the seconds of every step, and of what is left."""
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begun

        return run

    examples = load_examples(shipped_file("sentiment.jsonl"))
    if n is not None:
        # From all of the file, for its splits follow one another.
        examples = examples.subset(range(0, len(examples), len(examples) // n))
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for name, (home, attribute) in STEPS.items():
            wrapped = timed(name, getattr(home, attribute))
            stack.enter_context(mock.patch.object(home, attribute, wrapped))
        ExpertSteer().fit(TARGET, EXPERT, examples, progress=False)
    whole = time.perf_counter() - begun
    return dict(spent) | {"rest": whole - sum(spent.values())}


def prepare_fit(n: int | None) -> Mapping[str, Callable[[], Any]]:
    runs: list[dict[str, float]] = []

    def fit() -> list[dict[str, float]]:
        runs.append(profiled_fit(n))
        return runs

    return {OURS: fit}


def compare(returned: dict[str, Any]) -> dict[str, float]:
    timed = returned[OURS][1:]
    return {f"seconds of {step}": median(run[step] for run in timed) for step in timed[0]}


def cases(quick: bool) -> list[Case]:
    n = 256 if quick else 2048
    return [
        Case(
            name="reach",
            title="What the machine reaches",
            sizes={"n": n},
            prepare=functools.partial(all_reaches, n),
            helpers=KINDS,
            memory=False,
            work={kind: (kind, reach(kind, n).amount) for kind in KINDS},
        ),
        Case(
            name="fit",
            title="A whole fit, from the models' names to the pack",
            sizes={"target": TARGET, "expert": EXPERT, "texts": 40 if quick else "all shipped"},
            prepare=functools.partial(prepare_fit, 40 if quick else None),
            compare=compare,
        ),
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
