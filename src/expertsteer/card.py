"""The card that goes to the hub with a pack: how it was made, measured, and not tested."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from expertsteer.errors import PackError
from expertsteer.pack import SteeringPack

__all__ = ["pack_card", "read_evaluation"]


def pack_card(pack: SteeringPack, repo_id: str, evaluations: Sequence[dict[str, Any]] = ()) -> str:
    """Return a README for a pack on the Hugging Face hub.

    Parameters
    ----------
    pack : SteeringPack
    repo_id : str
        "owner/name".
    evaluations : sequence of dict
        Summaries of evaluations of this pack, see `read_evaluation`.

    Returns
    -------
    str
        Markdown with the hub's YAML header.
    """
    base = pack.target.name if _may_be_on_the_hub(pack.target.name) else None
    header = ModelCardData(
        base_model=base,
        library_name="expertsteer",
        tags=["steering-vectors", "activation-steering", "expertsteer"],
    )
    expert = f"`{pack.expert.name}`" if pack.expert else "the target itself"
    rows = "\n".join(
        f"| {p.expert_layer} | {p.target_layer} | {pack.mean_residual_norms[p.target_layer]:,.1f} |"
        for p in pack.pairs
        if p.target_layer in pack.vectors
    )
    warnings = "\n".join(f"- {warning}" for warning in _not_tested(pack, evaluations))
    strength = f"strength={pack.strength:g}" if pack.strength else "strength=..."
    return f"""---
{header.to_yaml().strip()}
---

# Steering pack for {pack.target.name}

Steers `{pack.target.name}` at inference with vectors of {expert}; no weights change.

```python
from expertsteer import SteeringPack

pack = SteeringPack.from_hub("{repo_id}")  # revision=... pins a commit
with pack.apply(model, {strength}):
    model.generate(...)
```

| expert layer | target layer | mean residual norm |
|---|---|---|
{rows}

Made for weights `{pack.target.weights}` ({pack.target.n_layers} blocks, width
{pack.target.width}); loading it for another model is refused.

## Evaluation

{_evaluation_tables(evaluations)}

## What it was not tested for

{warnings}

## Provenance

```yaml
{yaml.safe_dump(pack.provenance, sort_keys=False).strip()}
```
"""


def read_evaluation(folder: str | Path, pack: SteeringPack) -> dict[str, Any]:
    """Return the summary that `expertsteer evaluate` left in a folder.

    Parameters
    ----------
    folder : str or Path
    pack : SteeringPack
        The pack it must be of. Another strength of the same vectors counts as the same.

    Raises
    ------
    PackError
        If there is none, or it is of another pack or of no pack.
    """
    path = Path(folder) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        evaluated = summary["provenance"]["pack"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackError(
            f"Got {folder}, but expected a folder that expertsteer evaluate has finished ({error})."
        ) from error
    known = json.loads(json.dumps(pack.summary()))
    if evaluated is None or _vectors_of(evaluated) != _vectors_of(known):
        raise PackError(
            f"Got {folder}, but expected an evaluation of this pack. Evaluate it, or leave the "
            "folder out."
        )
    return summary


def _vectors_of(summary: dict[str, Any]) -> dict[str, Any]:
    """Return what decides a pack's vectors: not its strength, nor where it was downloaded."""
    names = ("layers", "mean_residual_norms", "target", "expert", "pairs")
    provenance = {name: v for name, v in summary["provenance"].items() if name != "hub"}
    return {name: summary[name] for name in names} | {"provenance": provenance}


def _evaluation_tables(evaluations: Sequence[dict[str, Any]]) -> str:
    if not evaluations:
        return "None came with this pack."
    lines = ["| data | strength | metric | mean | change from unsteered |", "|---|--:|---|--:|--:|"]
    for summary in evaluations:
        for data, answered in _answers(summary):
            for strength, metrics in answered["measurements"].items():
                for metric, found in metrics.items():
                    steered = float(strength) != 0
                    mean = _with_interval(found["mean"], found["interval"], ".3f")
                    change = _with_interval(found["change"], found["change_interval"], "+.3f")
                    cells = [data, f"{float(strength):g}", metric, mean, change if steered else ""]
                    lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "95 % bootstrap intervals over the items; changes are paired."]
    damages = []
    for summary in evaluations:
        unsteered = summary["perplexity"].get("0.0")
        for strength, perplexity in summary["perplexity"].items():
            cells = [f"{float(strength):g}", f"{perplexity:,.1f}", f"{perplexity / unsteered:.2f}"]
            damages.append(f"| {' | '.join(cells)} | {summary['divergence'][strength]:.4f} |")
    if damages:
        head = ["| strength | perplexity of plain text | times unsteered | KL a token (nats) |"]
        lines += ["", *head, "|--:|--:|--:|--:|", *dict.fromkeys(damages)]
    return "\n".join(lines)


def _answers(summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what was evaluated, and the measurements of it."""
    if "tasks" in summary:
        for name, answered in summary["tasks"].items():
            yield f"{name} (lm-eval, {answered['n_questions']} items)", answered
        return
    task = summary["provenance"]["task"]
    name = Path(str(task.get("data") or task.get("source") or task["kind"])).stem
    yield f"{name} ({summary['n_questions']} items)", summary


def _with_interval(mean: float, interval: Sequence[float], style: str) -> str:
    return f"{mean:{style}} ({interval[0]:{style}} to {interval[1]:{style}})"


def _not_tested(pack: SteeringPack, evaluations: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what nobody knows of this pack, as far as it can tell itself."""
    if not evaluations:
        yield "No evaluation: whether it does what it was made for was not measured."
    if not any(summary["perplexity"] for summary in evaluations):
        yield "No damage measured: what it costs on unrelated text is unknown."
    strengths = sorted(
        {float(s) for e in evaluations for _, a in _answers(e) for s in a["measurements"]} - {0.0}
    )
    if strengths:
        listed = ", ".join(f"{strength:g}" for strength in strengths)
        positions = sorted({e["provenance"]["settings"]["positions"] for e in evaluations})
        yield f"Strengths other than {listed}, and positions other than {', '.join(positions)}."
    calibration = pack.provenance.get("calibration")
    if calibration is None:
        yield f"Not calibrated: its strength {pack.strength:g} is a default, not a choice."
    elif calibration["chosen"] is None:
        yield (
            "Calibration found no strength within its budget that beats the unsteered model: "
            "any strength is beyond what was calibrated."
        )
    else:
        yield (
            f"Strengths beyond the calibrated {pack.strength:g}: that one is within a "
            f"{calibration['damage']} budget of {calibration['budget']:g} on the text it was "
            "calibrated on."
        )
    yield (
        f"Other models than the weights `{pack.target.weights}`: fine-tunes, other revisions and "
        "quantised copies may answer to it differently."
    )
    yield "Other languages and kinds of text than those it was made from and evaluated on."
    yield "Other behaviours: what else it changes in what the model says, safety among it."


def _may_be_on_the_hub(name: str) -> bool:
    """Tell hub ids from local folders, which the hub refuses as a base model."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
