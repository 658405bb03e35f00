"""The tables and pictures of docs/performance.md, from the files of results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# In the order of the page.
ORDER = (
    "collecting",
    "collecting_memory",
    "recursive_feature_machine",
    "mutual_information",
    "alignment",
    "whole_fit",
    "generation",
    "multiple_choice",
    "start_up",
)
# Folders of results: of a processor with AVX2, and of one with AVX512 and bfloat16.
FOLDERS = ("", "avx512/")
OURS = "expertsteer"
NOTHING = "There are no results yet; `make bench` makes them."


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the results there are, by folder and benchmark."""
    return {
        within + name: json.loads(path.read_text(encoding="utf-8"))
        for within in FOLDERS
        for name in (*ORDER, "bound", "half_precision")
        if (path := folder / f"{within}{name}.json").is_file()
    }


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the page's tables by the names of their places."""
    return {
        "goals": _goals(results),
        "times": _times(results),
        "bound": _bound(results),
        "profile": _profile(results),
        "half-precision": _half_precision(results),
        "pictures": _pictures(results),
        "machine": _machines(results),
    }


def _cases(
    results: dict[str, dict[str, Any]], folders: Sequence[str] = FOLDERS
) -> Iterator[dict[str, Any]]:
    """Yield the cases in the order of the page, with the processor in titles of other folders."""
    for name in ORDER:
        for within in folders:
            found = results.get(within + name, {})
            processor = f", {found['machine']['instructions']}" if found and within else ""
            for case in found.get("cases", {}).values():
                yield case | {"title": case["title"] + processor}


def _goals(results: dict[str, dict[str, Any]]) -> str:
    rows = [
        [case["title"], _figure_name(goal["figure"]), _bound_of(goal), _value(case, goal)]
        for case in _cases(results)
        for goal in case["goals"]
    ]
    return _table(["work", "figure", "goal", "median (range)"], rows, "lllr")


def _value(case: dict[str, Any], goal: dict[str, Any]) -> str:
    found = case["figures"].get(goal["figure"])
    if found is None:
        return "not measured"
    shown = _with_range(found)
    said = "" if goal["reached"] else ", missed"
    interval = _median_interval(case, goal["figure"])
    if interval is None:
        return f"{shown}{said}"
    low, high = interval
    bound = goal["at_most"] if goal["at_least"] is None else goal["at_least"]
    if low <= bound <= high:
        # The machine's noise is larger than what is asked for, whichever side the median is on.
        return f"{shown}, undecided: 95 % of medians {_number(low)} to {_number(high)}"
    return f"{shown}{said}"


def _median_interval(case: dict[str, Any], figure: str) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of a ratio's median over the rounds."""
    from expertsteer.evaluation.intervals import statistic_interval

    kind, _, ways = figure.partition(" ")
    above, _, below = ways.partition(" / ")
    seconds = case["seconds"]
    if kind == "seconds":
        ratios = seconds[ways]
    elif below not in seconds:
        return None
    else:
        names = [above] if above != "best" else _peers(case)
        best = [min(times) for times in zip(*(seconds[name] for name in names), strict=False)]
        ratios = [a / b for a, b in zip(best, seconds[below], strict=False)]
    return statistic_interval(
        lambda rounds: statistics.median(ratios[n] for n in rounds), len(ratios)
    )


def _peers(case: dict[str, Any]) -> list[str]:
    return [way for way in case["ways"][1:] if way not in case["helpers"]]


def _times(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for case in _cases(results):
        sizes = ", ".join(f"{key} {_plain(value)}" for key, value in case["sizes"].items())
        title = f"{case['title']} ({sizes})" if sizes else case["title"]
        for way in case["ways"]:
            seconds = case["figures"][f"seconds {way}"]
            factor = case["scale"].get(way)
            peak = case["figures"].get(f"peak_mib {way}")
            rows.append(
                [
                    title if way == case["ways"][0] else "",
                    way if factor is None else f"{way} (a share, × {factor:g})",
                    _with_range(seconds),
                    str(seconds["rounds"]),
                    "–" if peak is None else f"{peak['median']:,.0f}",
                ]
            )
    return _table(["work", "way", "seconds, median (range)", "rounds", "peak MiB"], rows, "llrrr")


def _bound(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for within in FOLDERS:
        once = results.get(f"{within}bound", {}).get("cases", {}).get("reach")
        if once is None:
            continue
        for case in _cases(results, [within]):
            for way, (kind, amount) in case["work"].items():
                rate = case["figures"][f"giga a second {way}"]["median"]
                beside = case["figures"].get(f"giga a second reach {kind}")
                reached = (beside or once["figures"][f"giga a second {kind}"])["median"]
                rows.append(
                    [
                        f"{case['title']}, {way}",
                        _KINDS[kind],
                        f"{amount / 1e9:,.1f}",
                        f"{rate:,.1f}",
                        f"{reached:,.1f}" + ("" if beside else " †"),
                        _per_cent(rate / reached),
                    ]
                )
    head = ["work", "counted", "giga", "giga a second", "reach", "of the reach"]
    note = "\n\n† measured in another hour, when the machine may have been faster or slower."
    return _table(head, rows, "llrrrr") + (note if any("†" in row[4] for row in rows) else "")


_KINDS = {
    "float32": "operations in float32",
    "float64": "operations in float64",
    "weights": "bytes of weights read",
}


def _profile(results: dict[str, dict[str, Any]]) -> str:
    prefix = "seconds of "
    spent = {
        _processor(found): {
            name.removeprefix(prefix): figure["median"]
            for name, figure in found["cases"]["fit"]["figures"].items()
            if name.startswith(prefix)
        }
        for found in _in_all_folders(results, "bound")
        if "fit" in found["cases"]
    }
    if not spent:
        return NOTHING
    first = next(iter(spent.values()))
    rows = []
    for step in sorted(first, key=lambda step: -first[step]):
        row = [step]
        for taken in spent.values():
            row += [f"{taken[step]:,.2f}", _per_cent(taken[step] / sum(taken.values()))]
        rows.append(row)
    head = [cell for processor in spent for cell in (f"seconds, {processor}", "share")]
    return _table(["step", *head], rows, "l" + "rr" * len(spent))


def _half_precision(results: dict[str, dict[str, Any]]) -> str:
    names = ("median relative difference of a state", "least cosine of a direction")
    rows = []
    for found in _in_all_folders(results, "half_precision"):
        processor = _processor(found)
        for case in found["cases"].values():
            figures = case["figures"]
            seconds = [_with_range(figures[f"seconds {way}"]) for way in case["ways"]]
            measured = [f"{figures[name]['median']:.4g}" for name in names]
            rows.append([case["title"], processor, *measured, *seconds])
    return _table(["work", "processor", *names, "seconds, float32", "bfloat16"], rows, "llrrrr")


def _in_all_folders(results: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [results[within + name] for within in FOLDERS if within + name in results]


def _processor(found: dict[str, Any]) -> str:
    return f"{found['machine']['processor']} ({found['machine']['instructions']})"


def _machines(results: dict[str, dict[str, Any]]) -> str:
    from expertsteer.provenance import machine_line

    lines: dict[str, list[str]] = {}
    for name, found in results.items():
        threads = found["threads"]
        line = (
            f"{machine_line(found['machine'], found['versions'])}; "
            f"{threads} thread{'s' if threads > 1 else ''}"
            f"{'; small sizes, only to check' if found['quick'] else ''}."
        )
        lines.setdefault(line, []).append(f"`{name}`")
    if len(lines) == 1:
        return next(iter(lines))
    return "\n\n".join(f"{', '.join(on)}: {line}" for line, on in lines.items()) or NOTHING


# Cells -------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]], alignment: str) -> str:
    if not rows:
        return NOTHING
    rules = ["--:" if side == "r" else "---" for side in alignment]
    lines = [head, rules, *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure_name(figure: str) -> str:
    kind, _, rest = figure.partition(" ")
    if kind == "ratio":
        above, below = rest.split(" / ")
        above = "fastest peer" if above == "best" else above
        return f"time of {above} over {below}"
    units = {"seconds": "seconds", "peak_mib": "peak MiB", "more_mib": "MiB beyond model and texts"}
    return f"{units[kind]}, {rest}" if kind in units else figure


def _bound_of(goal: dict[str, Any]) -> str:
    if goal["at_least"] is not None:
        return f"≥ {_number(goal['at_least'])}"
    return f"≤ {_number(goal['at_most'])}"


def _with_range(found: dict[str, Any]) -> str:
    if "range" not in found:
        return _number(found["median"])
    low, high = found["range"]
    return f"{_number(found['median'])} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}" if not 0.9 < abs(value) < 1.1 else f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def _per_cent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


# Pictures ----------------------------------------------------------------------------

_TIMES = "performance-times.svg"
_MEMORY = "performance-memory.svg"


def _bars(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (case["title"], way, case["figures"][f"ratio {way} / {OURS}"])
        for case in _cases(results)
        for way in case["ways"]
        if f"ratio {way} / {OURS}" in case["figures"] and way not in case["helpers"]
    ]


def _pictures(results: dict[str, dict[str, Any]]) -> str:
    shown = []
    if _bars(results):
        shown.append(f"![Time of every peer over this package's](images/{_TIMES})")
    if "collecting_memory" in results:
        shown.append(f"![Memory of collecting by the number of texts](images/{_MEMORY})")
    return "\n\n".join(shown) or NOTHING


def draw(results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every way's time relative to ours, and the memory of collecting.

    Returns
    -------
    list of Path
        The pictures drawn; none where there are no results for them.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = []
    bars = _bars(results)
    memory = list(results.get("collecting_memory", {}).get("cases", {}).values())
    # The same file from the same results.
    with mpl.rc_context({"svg.hashsalt": "performance", "svg.fonttype": "none"}):
        if bars:
            figure = Figure(figsize=(9, 0.3 * len(bars) + 1), layout="constrained")
            axes = figure.subplots()
            middle = [found["median"] for *_, found in bars]
            spread = [
                [found["median"] - found["range"][0] for *_, found in bars],
                [found["range"][1] - found["median"] for *_, found in bars],
            ]
            # From 1 on: on an axis of powers a bar has no other beginning.
            beyond = [value - 1 for value in middle]
            axes.barh(range(len(bars)), beyond, left=1, xerr=spread, color="#4c72b0")
            labels = [f"{title.replace('`', '')}: {way}" for title, way, _ in bars]
            axes.set_yticks(range(len(bars)), labels)
            axes.invert_yaxis()
            axes.set_xscale("log")
            axes.axvline(1, color="black", linewidth=1)
            axes.set_xlabel("time over this package's")
            drawn.append(_save(figure, folder / _TIMES))
        if memory:
            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.subplots()
            texts = [case["sizes"]["texts"] for case in memory]
            for label, values in (
                (
                    "taken by collecting",
                    [c["figures"][f"more_mib {OURS}"]["median"] for c in memory],
                ),
                ("the states themselves", [c["sizes"]["states (MiB)"] for c in memory]),
            ):
                axes.plot(texts, values, marker="o", label=label)
            axes.set_xscale("log")
            axes.set_xlabel("texts")
            axes.set_ylabel("MiB")
            axes.legend()
            drawn.append(_save(figure, folder / _MEMORY))
    return drawn


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path
