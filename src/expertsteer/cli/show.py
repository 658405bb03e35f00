"""Tables and messages on the terminal."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from expertsteer.processes import is_launched, process_name

if TYPE_CHECKING:
    from expertsteer.calibration import Calibration
    from expertsteer.comparison import Comparison
    from expertsteer.evaluation.damage import Damage
    from expertsteer.evaluation.harness_run import HarnessEvaluation, TaskEvaluation
    from expertsteer.evaluation.run import Evaluation
    from expertsteer.generation import Generation
    from expertsteer.layer_pair import LayerPair

__all__ = [
    "answer",
    "calibration_table",
    "comparison_table",
    "evaluation_tables",
    "generation_table",
    "pairs_table",
    "print_error",
    "print_json",
    "progress",
    "quieten",
    "say",
    "warnings_as_messages",
]

# Answers go to standard output, everything about the work to standard error.
answer = Console()
progress = Console(stderr=True)
_errors = Console(stderr=True)


def quieten() -> None:
    """Show nothing any more but errors."""
    answer.quiet = progress.quiet = True


def say(text: str) -> None:
    """Say what is being done."""
    progress.print(f"[dim]expertsteer:[/dim] {escape(text)}", highlight=False, soft_wrap=True)


def print_error(message: str) -> None:
    """Print an error as one line, whatever its message quotes."""
    line = escape(" ".join(message.splitlines()))
    # Any of several processes may be the one that fails.
    who = f"{process_name()}: " if is_launched() else ""
    _errors.print(f"{who}[red]error:[/red] {line}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON for a program to read; NaN becomes null, which JSON has no other word for."""
    answer.print_json(json.dumps(_finite(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warnings_as_messages() -> None:
    """Show warnings as messages instead of source lines."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            line = escape(" ".join(str(message).splitlines()))
            progress.print(f"[yellow]warning:[/yellow] {line}", highlight=False, soft_wrap=True)

    warnings.showwarning = show


def pairs_table(pairs: Sequence[LayerPair], norms: dict[int, float] | None = None) -> Table:
    """Return a table of layer pairs and their measurements."""
    table = Table(
        title="Layer pairs",
        title_justify="left",
        caption="R² and reconstruction error of the encoder on held-out texts, AUC of the "
        "direction on validation texts",
        caption_justify="left",
    )
    names = ["expert", "target", "MI (nats)", "R²", "recon. error", "AUC"]
    for name in [*names, "mean norm"] if norms else names:
        table.add_column(name, justify="right")
    for pair in pairs:
        cells = [
            str(pair.expert_layer),
            str(pair.target_layer),
            _number(pair.mutual_information, ".2f"),
            _number(pair.r2, ".3f"),
            _number(pair.reconstruction_error, ".4f"),
            _number(pair.auc, ".3f"),
        ]
        if norms:
            cells.append(f"{norms[pair.target_layer]:,.0f}")
        table.add_row(*cells)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of a comparison."""
    places = ", ".join(f"{p.expert_layer}→{p.target_layer}" for p in comparison.pairs)
    table = Table(
        title=f"Layers {places}, strength {comparison.strength:g} × mean residual norm",
        title_justify="left",
        caption=f"effect: change of the log-odds of positive over negative words after "
        f"{comparison.n_prompts} neutral prompts, with its 95 % interval; perplexity of "
        f"{comparison.n_sentences} plain sentences; cosine with the target's own mean difference",
        caption_justify="left",
    )
    table.add_column("vector", no_wrap=True)
    for name in ("cosine", "effect", "95 % interval", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.rows:
        low, high = row.effect_interval
        unsteered = row.cosine is None
        table.add_row(
            row.method,
            _number(row.cosine, "+.2f"),
            "–" if unsteered else f"{row.effect:+.2f}",
            "–" if unsteered else f"{low:+.2f} to {high:+.2f}",
            f"{row.perplexity:,.1f}" if row.perplexity < 1000 else f"{row.perplexity:,.0f}",
        )
    return table


def generation_table(generations: Sequence[Generation]) -> Table:
    """Return prompts with their unsteered and steered continuations side by side."""
    table = Table(show_lines=True, title="Continuations", title_justify="left")
    strengths = list(generations[0].continuations)
    table.add_column("prompt", ratio=2, style="bold")
    for strength in strengths:
        table.add_column("unsteered" if strength == 0 else f"strength {strength:+g}", ratio=3)
    for generation in generations:
        # Text, not str: what a model writes is not markup.
        continued = [Text(generation.continuations[s].strip()) for s in strengths]
        table.add_row(Text(generation.prompt), *continued)
    return table


def evaluation_tables(evaluation: Evaluation | HarnessEvaluation) -> Group:
    """Return the tables of an evaluation: answers and damage by strength."""
    from expertsteer.evaluation.run import Evaluation

    if isinstance(evaluation, Evaluation):
        task = evaluation.provenance["task"]
        items = "prompts" if task["kind"] == "generations" else "questions"
        title = f"{evaluation.n_questions} {items}"
        tables = [_answers_table(title, evaluation, task.get("judges", ()))]
    else:
        tables = [
            _answers_table(f"{name}, {task.n_questions} questions", task)
            for name, task in evaluation.tasks.items()
        ]
    if evaluation.perplexity:
        tables.append(_damage_table(evaluation))
    return Group(*tables)


def _answers_table(
    title: str, answered: Evaluation | TaskEvaluation, judges: Sequence[dict[str, Any]] = ()
) -> Table:
    caption = "95 % bootstrap intervals over the items; changes from unsteered are paired"
    for judge in judges:
        if "accuracy" in judge:
            caption += (
                f"; {judge['name']}: accuracy {judge['accuracy']:.3f} on {judge['n_held_out']} "
                f"held-out texts, {judge['majority']:.3f} of them of the larger class"
            )
    if answered.n_cut:
        title += f" ({answered.n_cut} lost their beginning to the context length)"
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    for name in ("strength", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("mean", "95 % interval", "change", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for strength, metrics in answered.measurements.items():
        for metric, found in metrics.items():
            change = [_figure(found.change, "+"), _figures(found.change_interval, "+")]
            table.add_row(
                _strength(strength),
                metric,
                _figure(found.mean),
                _figures(found.interval),
                *(change if strength else ["–", "–"]),
            )
        table.add_section()
    return table


def _damage_table(damage: Damage) -> Table:
    title = f"{damage.n_plain_texts} plain texts"
    if damage.n_plain_cut:
        title += f" ({damage.n_plain_cut} lost their end to the context length)"
    table = Table(title=title, title_justify="left")
    table.add_column("strength")
    for name in ("perplexity", "times unsteered", "KL a token (nats)"):
        table.add_column(name, justify="right")
    for strength, perplexity in damage.perplexity.items():
        table.add_row(
            _strength(strength),
            f"{perplexity:,.1f}",
            f"{perplexity / damage.perplexity[0.0]:,.2f}",
            f"{damage.divergence[strength]:.4f}",
        )
    return table


def calibration_table(calibration: Calibration) -> Table:
    """Return the trials of a calibration, by strength."""
    table = Table(
        title=f"Calibration, {calibration.damage} budget {calibration.budget:g}",
        title_justify="left",
        caption=f"effect: change of the {calibration.effect}, validation split, nats; 95 % "
        "bootstrap interval",
        caption_justify="left",
    )
    for name in ("", "strength", "layers", calibration.damage, "effect", "95 % interval"):
        table.add_column(name, justify="right")
    for trial in sorted(calibration.trials, key=lambda trial: (trial.layers, trial.strength)):
        measured = ["over budget", ""]
        if trial.effect is not None and trial.effect_interval is not None:
            measured = [f"{trial.effect:+.3f}", _interval(trial.effect_interval, "+.3f")]
        table.add_row(
            "→" if trial == calibration.chosen else "",
            f"{trial.strength:.4f}",
            ", ".join(map(str, trial.layers)),
            f"{trial.damage:,.3f}",
            *measured,
        )
    return table


def _strength(strength: float) -> str:
    return f"{strength:+g}" if strength else "0"


def _figure(value: float, sign: str = "") -> str:
    """Return four digits or so, that words and perplexities fit beside shares."""
    return format(value, f"{sign}.3f" if abs(value) < 10 else f"{sign},.1f")


def _figures(interval: tuple[float, float], sign: str = "") -> str:
    return " to ".join(_figure(end, sign) for end in interval)


def _interval(interval: tuple[float, float], style: str) -> str:
    return f"{interval[0]:{style}} to {interval[1]:{style}}"


def _number(value: float | None, style: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, style)
