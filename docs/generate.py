"""Write the parts of the documentation that come from the code and from results.

``docs/reference/command-line.md`` comes from the command line itself, the tables between
markers in ``docs/method.md``, ``docs/findings.md`` and ``docs/performance.md`` from the files of
results, and so do the pictures of the last and every study's report. With ``--check`` nothing is
written, and the exit code is 1 where a page is out of date.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import typing
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any

import typer
from typer.models import ArgumentInfo, OptionInfo

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = ROOT / "docs/reference/command-line.md"
METHOD = ROOT / "docs/method.md"
FINDINGS = ROOT / "docs/findings.md"
STUDIES = ROOT / "docs/results"
COMPARISON = ROOT / "docs/results/demo.json"
LOWEST = ROOT / "docs/results/lowest_mi.json"
BY_SCORE = ROOT / "docs/results/input_dependent_strength.json"
PERFORMANCE = ROOT / "docs/performance.md"
BENCHMARKS = ROOT / "benchmarks"
IMAGES = ROOT / "docs/images"
# What tells the cells of one method apart.
PLACE = ["target", "benchmark"]
REMAKE = {
    COMPARISON: "`expertsteer demo --output demo-output`, then copy demo-output/comparison.json",
    LOWEST: "the command in docs/method.md that ends in --output docs/results/lowest_mi.json",
    BY_SCORE: "the command in docs/findings.md that ends in --output "
    "docs/results/input_dependent_strength.json",
}
INTRODUCTION = """\
<!-- Written by docs/generate.py; edit the commands, not this page. -->
# Command line

`expertsteer --help` lists the commands, and `expertsteer COMMAND --help` shows what follows.
Answers go to standard output, messages and progress bars to standard error.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | an error; one line on standard error says what was found, what was expected and what to do |
| 2 | wrong usage, such as an unknown option |
| 130 | Ctrl-C; what is saved is kept |
| 143 | ended by the launcher because another process had ended |
"""


class GenerationError(Exception):
    """A page cannot be made; the message says what is missing."""


# Command line ------------------------------------------------------------------------


def command_line_page() -> str:
    """Return the reference of all commands as Markdown."""
    from expertsteer.cli.app import app

    commands = {(entry.name or entry.callback.__name__): entry for entry in app.registered_commands}
    sections = [INTRODUCTION]
    for name, entry in commands.items():
        sections += [f"## `expertsteer {name}`", *_description(entry.callback)]
        sections += _options(entry.callback)
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _description(command: Any) -> list[str]:
    paragraphs = []
    for paragraph in inspect.getdoc(command).split("\n\n"):
        text = " ".join(paragraph.split())
        example = text.removeprefix("Example: ")
        paragraphs.append(text if example == text else f"```bash\n{example}\n```")
    return paragraphs


def _options(command: Any) -> list[str]:
    hints = typing.get_type_hints(command, include_extras=True)
    panels: dict[str, list[str]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if hint is typer.Context:
            continue
        kind, info = typing.get_args(hint)[:2]
        panel = "Arguments" if isinstance(info, ArgumentInfo) else info.rich_help_panel or "Options"
        panels.setdefault(panel, []).append(_row(parameter, kind, info))
    head = "| | default | |\n|---|---|---|"
    order = ["Arguments", *(name for name in panels if name not in ("Arguments", "Options"))]
    return [
        f"**{panel}**\n\n{head}\n" + "\n".join(panels[panel])
        for panel in [*order, "Options"]
        if panel in panels
    ]


def _row(parameter: inspect.Parameter, kind: Any, info: OptionInfo | ArgumentInfo) -> str:
    kind = _plain_type(kind)
    if isinstance(info, ArgumentInfo):
        names = f"`{parameter.name.upper()}`"
    else:
        # Inside Annotated, the first name given lands where a default otherwise stands.
        given = [info.default] if isinstance(info.default, str) else []
        declared = [*given, *(info.param_decls or ())]
        declared = declared or [f"--{parameter.name.replace('_', '-')}"]
        value = "" if kind is bool else f" {_value_name(kind)}"
        longest_last = sorted(declared, key=len)
        names = ", ".join(f"`{name}`" for name in longest_last[:-1])
        names += (", " if names else "") + f"`{longest_last[-1]}{value}`"
    text = " ".join((info.help or "").split())
    if isinstance(kind, type) and issubclass(kind, Enum):
        text += f" One of {', '.join(f'`{member.value}`' for member in kind)}."
    if info.min is not None:
        text += f" From {info.min:g} up."
    return f"| {names} | {_default(parameter.default)} | {text.replace('|', chr(92) + '|')} |"


def _plain_type(kind: Any) -> Any:
    """Return X of ``X | None`` and of ``list[X]``."""
    if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def _value_name(kind: Any) -> str:
    if issubclass(kind, Enum):
        return "NAME"
    return {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}[kind]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False:
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


# Results -----------------------------------------------------------------------------


def method_page() -> str:
    """Return the page of the method with its tables filled in."""
    tables = {
        "comparison": _comparison(COMPARISON),
        "lowest": _comparison(LOWEST),
    }
    return _filled(METHOD, tables)


def findings_page() -> str:
    """Return the page of the studies' findings with its tables filled in."""
    from expertsteer.study.report import MEASURES

    names = [path.parent.name for path in sorted(STUDIES.glob("*/study.json"))]
    tables = {name: _study(STUDIES / name) for name in names}
    tables |= {
        "measures": MEASURES,
        "ridge-choice": _ridge_choice(STUDIES / "ridge"),
        "input-dependent-strength": _by_score(BY_SCORE),
        "domain-experts-training": _training(STUDIES / "domain_experts/experts"),
        "layers-shares": _shares_by_text(STUDIES / "layers"),
        "transfer-shares": _transfer_shares(STUDIES / "transfer"),
        "seeds-effects": _by_seed(STUDIES / "seeds"),
    }
    return _filled(FINDINGS, tables)


def draw_studies() -> None:
    """Write the reports and pictures of all studies from their cells."""
    from expertsteer.study.report import write_report

    for study in sorted(STUDIES.glob("*/study.json")):
        for path in write_report(study.parent):
            print(f"wrote {path.relative_to(ROOT)}")


def performance_page() -> str:
    """Return the page of performance with the tables of the benchmarks there are."""
    report = _report()
    return _filled(PERFORMANCE, report.tables(report.load_results()))


def draw_performance() -> None:
    """Draw the pictures of the page of performance."""
    report = _report()
    for path in report.draw(report.load_results(), IMAGES):
        print(f"wrote {path.relative_to(ROOT)}")


def _report() -> Any:
    # The benchmarks are scripts beside the package, not a part of it.
    spec = importlib.util.spec_from_file_location("benchmarks_report", BENCHMARKS / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _filled(path: Path, tables: dict[str, str]) -> str:
    page = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, after = f"<!-- {name}: written by docs/generate.py -->", f"<!-- {name}: end -->"
        if page.count(before) != 1 or page.count(after) != 1:
            place = path.relative_to(ROOT)
            raise GenerationError(f"{place} has no place marked for the table {name!r}.")
        head, _, rest = page.partition(before)
        _, _, tail = rest.partition(after)
        page = f"{head}{before}\n\n{table}\n\n{after}{tail}"
    return page


def _comparison(path: Path) -> str:
    from expertsteer.provenance import machine_line

    results = _read(path)
    provenance = results["provenance"]
    rows = ["| vector | cosine | effect | 95 % interval | perplexity |", "|---|--:|--:|--:|--:|"]
    for row in results["rows"]:
        perplexity = row["perplexity"]
        shown = f"{perplexity:,.1f}" if perplexity < 1000 else f"{perplexity:,.0f}"
        cells = [row["method"], "", "", "", shown]
        if row["cosine"] is not None:
            low, high = row["effect_interval"]
            cells[1:4] = [
                f"{row['cosine']:+.2f}",
                f"{row['effect']:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
            ]
        numbers = [cell.replace("-", "−") for cell in cells[1:]]
        rows.append("| " + " | ".join([row["method"], *numbers]) + " |")
    pairs = ", ".join(f"{p['expert_layer']} → {p['target_layer']}" for p in results["pairs"])
    r2 = ", ".join(f"{p['r2']:.2f}" for p in results["pairs"])
    expert, target = (_model(provenance[role]) for role in ("expert", "target"))
    data = provenance["data"]
    seeds = " and ".join(map(str, provenance["seeds"]))
    plain = provenance["n_plain_texts"]
    aligned_on = f", and {plain:,} sentence beginnings of plain text" if plain else ""
    facts = (
        f"Expert: {expert}. Target: {target}. Layers (expert → target): {pairs}, held-out R² of "
        f"the encoder {r2}. Strength: {results['strength']:g} of the mean residual norm. Vectors: "
        f"{data['n_examples']} labelled texts (train and validation splits){aligned_on}. Effect: "
        f"{results['n_prompts']} prompts. Perplexity: {results['n_sentences']} sentences. Seeds: "
        f"{seeds}. Machine: {machine_line(provenance['machine'], provenance['versions'])}."
    )
    return "\n".join(rows) + f"\n\n{facts}"


def _study(folder: Path) -> str:
    """Return a study's averages, a table a target, and what they were measured with."""
    from expertsteer.study.frames import average_frame, cell_frame
    from expertsteer.study.report import average_tables, domain_frames, load_cells, notes

    study, cells, about = load_cells(folder)
    frame = cell_frame(study, cells)
    averages = average_frame(study, cells, frame)
    by_domain = domain_frames(study, cells, frame)
    parts = []
    for target in averages["target"].unique():
        tables = average_tables(study, averages, by_domain, target)
        parts += [f"Target: `{target}`", *tables]
    return "\n\n".join([*parts, *(line for line in notes(study, cells, about) if line)])


def _with_range(value: Any, low: Any, high: Any, form: str = "+.2f") -> str:
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _gains(folder: Path, setting: str) -> Any:
    """Return what each cell of a study adds to every test prompt's log-odds, as a frame.

    What the methods are called ends in the value of a setting, which has a column of its own.
    """
    import numpy as np
    import pandas as pd

    from expertsteer.study.report import load_cells

    _, cells, _ = load_cells(folder)
    unsteered = {
        tuple(cell[key] for key in PLACE): np.array(cell["test"]["log_odds"])
        for cell in cells
        if cell["method"] == "none"
    }
    rows = []
    for cell in cells:
        if cell["method"] != "none":
            arm, _, value = cell["method"].rpartition(", ")
            at = tuple(cell[key] for key in PLACE)
            gain = np.array(cell["test"]["log_odds"]) - unsteered[at]
            chosen = cell["validation"][-1]["effect"]
            rows.append((arm, value, *at, chosen, gain))
    return pd.DataFrame(rows, columns=["arm", setting, *PLACE, "validation", "test"])


def _shares_by_text(folder: Path) -> str:
    """Return the effect as a share of the own vector's, by the text of the alignment."""
    import pandas as pd

    frame = _gains(folder, "depth")
    frame = frame[frame["depth"].astype(float) >= 0.5]
    frame = frame.assign(effect=[gain.mean() for gain in frame["test"]])
    frame["arm"] = frame["arm"].str.removeprefix("transferred, ")
    both = frame.assign(benchmark="both")
    table = pd.concat([both, frame]).pivot_table(
        values="effect", index=PLACE, columns="arm", aggfunc="sum", sort=False
    )
    shares = table.div(table.pop("rfm"), axis=0).map("{:.2f}".format)
    return shares.reset_index().to_markdown(index=False, disable_numparse=True)


def _transfer_shares(folder: Path) -> str:
    """Return every pair's effect as a share of the own RFM vector's, with the behaviours' range."""
    import pandas as pd

    from expertsteer.study.figures import transfer_shares
    from expertsteer.study.frames import cell_frame
    from expertsteer.study.report import load_cells

    study, cells, _ = load_cells(folder)
    frame = cell_frame(study, cells)
    columns = {}
    for arm in study.methods:
        if arm.needs_expert:
            shares = transfer_shares(frame, arm.name, "rfm")
            single = transfer_shares(frame, arm.name, "rfm", ["benchmark"])
            ranges = single.groupby(["expert", "target"], sort=False).agg(["min", "max"])
            columns[arm.name] = ranges.assign(share=shares).apply(
                lambda row: _with_range(row["share"], row["min"], row["max"], ".2f"), axis=1
            )
    table = pd.DataFrame(columns).reset_index()
    return table.to_markdown(index=False, disable_numparse=True)


def _by_seed(folder: Path) -> str:
    """Return every method's effect over the benchmarks, a column a seed, and their range."""
    from expertsteer.study.frames import cell_frame
    from expertsteer.study.report import load_cells

    study, cells, _ = load_cells(folder)
    frame = cell_frame(study, cells)
    table = frame[frame["method"] != "none"].pivot_table(
        index=["target", "method"], columns="seed", values="effect", sort=False
    )
    shown = table.map("{:+.2f}".format).rename(columns="seed {}".format)
    shown["mean (range)"] = [
        _with_range(row.mean(), row.min(), row.max()) for _, row in table.iterrows()
    ]
    return shown.reset_index().to_markdown(index=False, disable_numparse=True)


def _ridge_choice(folder: Path) -> str:
    """Return what validation prompts say of every ridge, and what the test prompts say then."""
    import numpy as np

    from expertsteer.evaluation.intervals import strata_interval

    frame = _gains(folder, "noise")
    # Prompts are the same whatever labels are wrong: one value a prompt.
    by_arm = {
        arm: [np.mean(list(gains), axis=0) for _, gains in group.groupby(PLACE, sort=False)["test"]]
        for arm, group in frame.groupby("arm", sort=False)
    }

    def shown(parts: list[np.ndarray]) -> str:
        # Both sets are measured after the same prompts.
        asked = [[str(n) for n in range(len(part))] for part in parts]
        low, high = strata_interval(parts, [1.0] * len(parts), asked)
        return _with_range(np.mean([part.mean() for part in parts]), low, high)

    table = frame.pivot_table(values="validation", index="arm", columns="noise", sort=False)
    table.columns = [f"validation, {100 * float(noise):.0f} % wrong" for noise in table.columns]
    table["mean"] = table.mean(axis=1)
    table = table.map("{:+.2f}".format)
    table["test, mean"] = [shown(by_arm[arm]) for arm in table.index]
    plain = by_arm["mean_difference"]
    table["test, over mean_difference"] = [
        shown([a - b for a, b in zip(by_arm[arm], plain, strict=True)])
        if arm != "mean_difference"
        else ""
        for arm in table.index
    ]
    places = list(dict.fromkeys(zip(*(frame[key] for key in PLACE), strict=True)))
    for n, (target, benchmark) in enumerate(places):
        table[f"over it, {benchmark}, {target}"] = [
            f"{(by_arm[arm][n] - plain[n]).mean():+.2f}" if arm != "mean_difference" else ""
            for arm in table.index
        ]
    return table.rename_axis("direction").to_markdown(disable_numparse=True)


def _by_score(path: Path) -> str:
    """Return what steering the items that the expert's score asks for does, by pair of models."""
    import pandas as pd

    from expertsteer.evaluation.intervals import mean_interval
    from expertsteer.provenance import machine_line

    results = _read(path)
    found = pd.DataFrame(results["rows"])
    low, high = (found["gain_interval"].str[side] for side in (0, 1))
    found = found.assign(better=low > 0, worse=high < 0, settled=found["share"].isin((0, 1)))
    rows = []
    for _, sets in found.groupby(["expert", "target"]):
        gain = sets["gain"]
        rows.append(
            sets[["expert", "target"]].iloc[0].to_dict()
            | {
                "sets": len(sets),
                "all or none steered": sets["settled"].sum(),
                "all steered, nats": f"{sets['everywhere'].mean():+.2f}",
                "steered by score, nats": f"{sets['chosen'].mean():+.2f}",
                "over as many at random, nats": _with_range(
                    gain.mean(), *mean_interval(gain.to_numpy()), "+.3f"
                ),
                "sets better / worse": f"{sets['better'].sum()} / {sets['worse'].sum()}",
                "rank correlation": _with_range(*sets["spearman"].quantile([0.5, 0, 1])),
            }
        )
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return f"{table}\n\nMachine: {machine_line(results['machine'], results['versions'])}."


def _training(folder: Path) -> str:
    """Return what the training of the domain experts did to them."""
    import pandas as pd

    from expertsteer.provenance import machine_line

    rows, machines = [], []
    for path in sorted(folder.glob("*.json")):
        record = _read(path)
        losses = record["training"]["validation_loss"]
        before, after = record["validation"]["before"], record["validation"]["after"]
        row = {
            "expert": path.stem,
            "trained on": ", ".join(f"{n} of {name}" for name, n in record["n_questions"].items()),
            "validation loss, nats": f"{losses[0]:.2f} → {min(losses[1:]):.2f}",
            "validation questions": ", ".join(f"{before[name]['n']} of {name}" for name in before),
        }
        for metric, title in (("acc", "right"), ("acc_norm", "right, length-normalised")):
            row[title] = ", ".join(
                f"{100 * before[name][metric]:.1f} → {100 * after[name][metric]:.1f} %"
                for name in before
            )
        rows.append(row | {"training, s": f"{record['training']['seconds']:.0f}"})
        machines.append(machine_line(record["machine"], record["versions"]))
    if not rows:
        raise GenerationError(f"There are no results in {folder.relative_to(ROOT)}.")
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return f"{table}\n\nMachine: {'; '.join(dict.fromkeys(machines))}."


def _model(model: dict[str, Any]) -> str:
    return f"`{model['name']}` ({model['n_layers']} layers × {model['width']})"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GenerationError(
            f"There are no results at {path.relative_to(ROOT)}. Make them with {REMAKE[path]}."
        )
    return json.loads(path.read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------


def main(check: Annotated[bool, typer.Option("--check", help="Write nothing.")] = False) -> None:
    """Bring the generated pages up to date."""
    problems = []
    pages = (
        (COMMAND_LINE, command_line_page),
        (METHOD, method_page),
        (FINDINGS, findings_page),
        (PERFORMANCE, performance_page),
    )
    if not check:
        draw_performance()
        draw_studies()
    for path, make in pages:
        try:
            text = make()
        except GenerationError as error:
            problems.append(str(error))
            continue
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        name = path.relative_to(ROOT)
        if check:
            problems.append(f"{name} is out of date. Run: python docs/generate.py")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


if __name__ == "__main__":
    typer.run(main)
