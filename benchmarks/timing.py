"""Run several ways of doing one piece of work in turn, and keep what they took.

pytest-benchmark and asv time one function after the other. Here the ways take turns within
every round, in an order drawn by lot, so that a machine whose speed drifts favours none of them
and every round gives a ratio of its own. Memory is measured in processes of their own.

A benchmark is a file with a list of cases and one call::

    if __name__ == "__main__":
        main(__file__, __doc__, cases)

Its results go to ``results/<name of the file>.json``, case by case: what is there already is
not run again unless asked.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from reach import reach
from threadpoolctl import threadpool_limits

from expertsteer.files import write_text
from expertsteer.provenance import describe_machine, package_versions

FOLDER = Path(__file__).resolve().parent
ROUNDS = 5
OURS = "expertsteer"


@dataclass(frozen=True)
class Goal:
    """A figure of a case, and the bound it has to keep.

    Attributes
    ----------
    figure : str
        ``"seconds WAY"``, ``"peak_mib WAY"``, ``"more_mib WAY"`` (than when the inputs were
        ready), ``"ratio SLOW / FAST"`` (of the seconds, the
        median over the rounds), ``"ratio best / FAST"`` (against the fastest of the peers in
        every round), or a figure that the case's ``compare`` returns.
    at_least, at_most : float, optional
        The bound.
    """

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def reached_by(self, value: float | None) -> bool:
        """Return whether a value keeps the bound."""
        if value is None:
            return False
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Case:
    """One piece of work and the ways to do it.

    Attributes
    ----------
    name : str
        Within the benchmark.
    title : str
        What the work is, for the table.
    sizes : dict
        All that decides how much work it is: JSON types.
    prepare : callable
        Makes inputs and returns the ways by name, ours first; a way takes nothing. What it
        returns goes to ``compare``.
    goals : tuple of Goal
    compare : callable, optional
        Takes what the ways returned last, by name, and returns figures by name.
    scale : dict of str to float
        By way: what its time is multiplied with, where only a share of its work is run.
    helpers : tuple of str
        Ways that are no peers, such as a bare forward pass.
    rounds : int, optional
        Where it takes more than the usual to tell the ways apart.
    fixed : dict of str to int
        By way: rounds, where it takes too long for all of them. The first rounds are used.
    memory : bool
        Whether to measure the peak memory of every way, in a process of its own.
    work : dict of str to (str, float)
        By way: what it cannot do without ("float32" or "float64" operations, or bytes of
        "weights"), and how much of it. What the machine reaches of that is measured in turn
        with the ways, see ``reach.py``.
    """

    name: str
    title: str
    sizes: dict[str, Any]
    prepare: Callable[[], Mapping[str, Callable[[], Any]]]
    goals: tuple[Goal, ...] = ()
    compare: Callable[[dict[str, Any]], dict[str, float]] | None = None
    scale: dict[str, float] = field(default_factory=dict)
    helpers: tuple[str, ...] = ()
    rounds: int | None = None
    fixed: dict[str, int] = field(default_factory=dict)
    memory: bool = True
    work: dict[str, tuple[str, float]] = field(default_factory=dict)


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    fixed: Mapping[str, int] | None = None,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time every way once a round, in an order drawn anew for every round.

    Parameters
    ----------
    ways : mapping of str to callable
        Each runs once untimed first, save those with fixed rounds.
    rounds : int
    fixed : mapping of str to int, optional
        By way: how many rounds it takes part in.

    Returns
    -------
    seconds : dict of str to list of float
        By way, a time a round.
    results : dict
        By way, what it returned last.
    """
    fixed = fixed or {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    order = random.Random(0)
    # What is there now needs no looking through for garbage before every turn.
    gc.collect()
    gc.freeze()
    for turn in range(-1, rounds):
        for name in order.sample(list(ways), len(ways)):
            if turn >= fixed.get(name, rounds) or (turn < 0 and name in fixed):
                continue
            gc.collect()
            begun = time.perf_counter()
            results[name] = ways[name]()
            taken = time.perf_counter() - begun
            if turn >= 0:
                seconds[name].append(taken)
    gc.unfreeze()
    return seconds, results


def figures_of(
    seconds: Mapping[str, Sequence[float]], peers: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return every way's median and spread, and its ratio to the first, round by round."""
    ours = next(iter(seconds))
    figures: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        figures[f"seconds {name}"] = summary(times)
        if name != ours:
            figures[f"ratio {name} / {ours}"] = summary(_ratios(times, seconds[ours]))
            figures[f"ratio {ours} / {name}"] = summary(_ratios(seconds[ours], times))
    if peers:
        best = [min(times) for times in zip(*(seconds[name] for name in peers), strict=False)]
        figures[f"ratio best / {ours}"] = summary(_ratios(best, seconds[ours]))
    return figures


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of some values, the least and the largest, and how many they are."""
    return {
        "median": statistics.median(values),
        "range": [min(values), max(values)],
        "rounds": len(values),
    }


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=False)]


# Memory ------------------------------------------------------------------------------


def peak_memory(path: Path, case: Case, way: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run one way once in a fresh process and return the memory it took.

    Returns
    -------
    dict
        ``peak_mib``: the most memory the process held, ``before_mib``: the most until its
        inputs were made.
    """
    command = [sys.executable, path, "--case", case.name, "--way", way, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name} by {way} failed alone:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_mib() -> float:
    # ru_maxrss of a started process begins with its parent's, which has run everything; the
    # kernel's own mark of this address space does not.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _forget_peak() -> None:
    """Let the kernel's mark begin anew, so that getting ready is not counted."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not on this system: what getting ready took is counted then


def _run_alone(case: Case, way: str) -> None:
    ways = case.prepare()
    _forget_peak()
    before = _peak_mib()
    ways[way]()
    print(json.dumps({"peak_mib": _peak_mib(), "before_mib": before}))


# Command line ------------------------------------------------------------------------


def main(file: str, about: str | None, cases: Callable[[bool], Sequence[Case]]) -> None:
    """Run the cases of a benchmark that have no results yet.

    Parameters
    ----------
    file : str
        The benchmark's ``__file__``.
    about : str or None
        Its docstring.
    cases : callable
        Takes whether to be quick (small sizes, to check that all works) and returns the cases.
    """
    path = Path(file).resolve()
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="small sizes, 2 rounds")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, quick: 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true", help="run what has results too")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--case", help="run this case alone")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    limit_threads(options.threads)
    chosen = [c for c in cases(options.quick) if options.case in (None, c.name)]
    if not chosen:
        raise SystemExit(f"Got --case {options.case}, but there is no such case.")
    if options.way:
        _run_alone(chosen[0], options.way)
        return
    folder = options.output or FOLDER / ("quick-results" if options.quick else "results")
    usual = 2 if options.quick else ROUNDS
    passed_on = ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    results = Results(folder / f"{path.stem}.json", options.threads, options.quick, options.again)
    for case in chosen:
        if case.name in results.cases:
            print(f"{path.stem}, {case.name}: there already (--again runs it again)")
            continue
        print(f"{path.stem}, {case.name} ...", flush=True)
        rounds = options.rounds or case.rounds or usual
        if case.name not in results.unfinished:
            # Timing takes longest: from here on an interruption does not cost it.
            results.add(case, time_case(case, rounds), unfinished=case.memory)
        if case.memory:
            entry = results.unfinished[case.name]
            results.add(case, entry | memory_of(path, case, entry, passed_on))
        print(json.dumps(results.cases[case.name]["goals"], indent=2), flush=True)


def limit_threads(threads: int) -> None:
    """Let every library, and every process started from here, use as many threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch.set_num_threads(threads)
    threadpool_limits(threads)


def time_case(case: Case, rounds: int) -> dict[str, Any]:
    """Time a case; return its entry in the file of results, without memory."""
    ways = case.prepare()
    # The machine's speed drifts, so what it reaches is measured in turn with the work.
    kinds = {kind for way, (kind, _) in case.work.items() if way != kind}
    reaches = {f"reach {kind}": reach(kind) for kind in sorted(kinds)}
    all_ways = dict(ways) | {name: way.run for name, way in reaches.items()}
    seconds, returned = take_turns(all_ways, rounds, case.fixed)
    rates_reached = {
        f"giga a second {name}": summary([way.amount / t / 1e9 for t in seconds.pop(name)])
        for name, way in reaches.items()
    }
    seconds = {n: [t * case.scale.get(n, 1.0) for t in times] for n, times in seconds.items()}
    peers = [name for name in list(ways)[1:] if name not in case.helpers]
    figures = figures_of(seconds, peers) | rates_reached
    for goal in case.goals:
        above, _, below = goal.figure.removeprefix("ratio ").partition(" / ")
        if above in seconds and below in seconds:
            figures[goal.figure] = summary(_ratios(seconds[above], seconds[below]))
    for name, (_, amount) in case.work.items():
        rates = [amount / taken / 1e9 for taken in seconds[name]]
        figures[f"giga a second {name}"] = summary(rates)
    if case.compare is not None:
        found = {name: value for name, value in returned.items() if name in ways}
        figures |= {name: {"median": value} for name, value in case.compare(found).items()}
    return {
        "title": case.title,
        "sizes": case.sizes,
        "ways": list(ways),
        "helpers": list(case.helpers),
        "scale": case.scale,
        "work": case.work,
        "seconds": seconds,
        "figures": figures,
        "goals": _goals_of(case, figures),
    }


def memory_of(
    path: Path, case: Case, entry: Mapping[str, Any], passed_on: Sequence[str]
) -> dict[str, Any]:
    """Measure a case's memory; return what changes in its entry."""
    figures = dict(entry["figures"])
    for name in entry["ways"]:
        found = peak_memory(path, case, name, passed_on)
        figures[f"peak_mib {name}"] = {"median": found["peak_mib"]}
        figures[f"more_mib {name}"] = {"median": found["peak_mib"] - found["before_mib"]}
    return {"figures": figures, "goals": _goals_of(case, figures)}


def _goals_of(case: Case, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "figure": goal.figure,
            "at_least": goal.at_least,
            "at_most": goal.at_most,
            "value": (value := figures.get(goal.figure, {}).get("median")),
            "reached": goal.reached_by(value),
        }
        for goal in case.goals
    ]


class Results:
    """The file of results of one benchmark.

    Parameters
    ----------
    path : Path
        The file; continued where it is there.
    threads : int
        Threads of every library.
    quick : bool
        Whether the sizes are only good for checking.
    again : bool
        Begin anew.
    """

    def __init__(self, path: Path, threads: int, quick: bool, again: bool) -> None:
        self.path = path
        self.head: dict[str, Any] = {
            "quick": quick,
            "threads": threads,
            "machine": describe_machine(),
            "versions": package_versions() | _peer_versions(),
        }
        self.cases: dict[str, Any] = {}
        self.unfinished: dict[str, Any] = {}
        if path.exists() and not again:
            found = json.loads(path.read_text(encoding="utf-8"))
            self.cases, self.unfinished = found.pop("cases"), found.pop("unfinished", {})
            if found != self.head:
                raise SystemExit(
                    f"Got {path} from another machine, other versions or thread counts, but "
                    "expected the same. Run with --again, or name another --output."
                )

    def add(self, case: Case, entry: dict[str, Any], *, unfinished: bool = False) -> None:
        """Write a case's results; unfinished ones lack the memory and are on no page."""
        self.unfinished.pop(case.name, None)
        (self.unfinished if unfinished else self.cases)[case.name] = entry
        content = self.head | {"cases": self.cases}
        content |= {"unfinished": self.unfinished} if self.unfinished else {}
        text = json.dumps(content, indent=2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, text + "\n")


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in ("steering-vectors", "repeng", "xrfm", "scikit-learn", "ennemi", "lm-eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
