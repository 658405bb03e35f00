"""Make an expert of a domain: fine-tune a small model on the questions of some data sets.

The base model learns the right answers of the train splits: of multiple choice the text of
the right choice, as `expertsteer evaluate` scores it, of open answers the way to the answer
and "The answer is ...". The result is an ordinary checkpoint with its tokenizer, for
`--expert`, and domain_expert.json with the settings, the losses, and how many validation
questions were answered rightly before and after. Test splits are never read. Run with:
python studies/domain_expert.py --data medmcqa.jsonl --data medqa.jsonl --output medical
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertsteer.data import LabelledExamples
    from expertsteer.data.readers import Row
    from expertsteer.models import LanguageModel

RECORD = "domain_expert.json"


class Method(str, Enum):
    """What is trained."""

    full = "full"
    lora = "lora"


# All of a model's parameters want smaller steps than an adapter.
LEARNING_RATES = {Method.full: 5e-5, Method.lora: 5e-4}


def load_questions(source: str, end: str, seed: int) -> LabelledExamples:
    """Load a data set of multiple choice or of open answers.

    Parameters
    ----------
    source : str
        A file or hub data set.
    end : str
        What closes an open answer, so that a model learns where to stop.
    seed : int
        Of the splits, where multiple choice has none.

    Returns
    -------
    LabelledExamples
        An open answer is one positive row: the way to the answer, and the answer.
    """
    from expertsteer.data import load_examples
    from expertsteer.data.formats import load_rows

    rows = load_rows(source)
    _, first = rows[0]
    if "choices" in first or "question" not in first:
        return load_examples(source, seed=seed)
    return open_examples(source, rows, end, seed)


def open_examples(source: str, rows: list[Row], end: str, seed: int) -> LabelledExamples:
    """Return open questions, as `load_open_questions` asks them, with their solutions."""
    import numpy as np

    from expertsteer.data import LabelledExamples
    from expertsteer.evaluation.open_answers import open_questions_of

    ways = {
        str(row.get("id") or f"row {n}"): str(row.get("rationale") or "").strip()
        for n, (_, row) in enumerate(rows)
    }
    splits = {row.get("split") for _, row in rows}
    wanted = [name for name in ("train", "validation") if name in splits or splits == {None}]
    found = [
        (question, split)
        for split in wanted
        for question in open_questions_of(rows, source, split=split, seed=seed)
    ]
    return LabelledExamples(
        prompts=tuple(question.prompt for question, _ in found),
        answers=tuple(
            f"{ways[question.name]} The answer is {question.answer}.{end}".lstrip()
            for question, _ in found
        ),
        labels=np.ones(len(found), dtype=np.int8),
        splits=tuple(split for _, split in found),
        groups=tuple(f"{question.name} {n}" for n, (question, _) in enumerate(found)),
        source=source,
    )


def choose(
    sets: dict[str, LabelledExamples], split: str, limit: int, seed: int
) -> dict[str, LabelledExamples]:
    """Draw questions of one split from all sets together; sets without any are left out."""
    known = [
        (name, group)
        for name, examples in sets.items()
        for group in dict.fromkeys(
            g for g, s in zip(examples.groups, examples.splits, strict=True) if s == split
        )
    ]
    kept = set(random.Random(seed).sample(known, min(limit, len(known))))
    chosen = {}
    for name, examples in sets.items():
        rows = [row for row, group in enumerate(examples.groups) if (name, group) in kept]
        if rows:
            chosen[name] = examples.subset(rows)
    return chosen


def joined(parts: Sequence[tuple[str, LabelledExamples]], source: str) -> LabelledExamples:
    """Return the rows of several sets as one."""
    import numpy as np

    from expertsteer.data import LabelledExamples
    from expertsteer.errors import DataError

    if not parts:
        raise DataError(f"Got no train or validation rows in {source}, but expected some.")
    return LabelledExamples(
        prompts=tuple(prompt for _, part in parts for prompt in part.prompts),
        answers=tuple(answer for _, part in parts for answer in part.answers),
        labels=np.concatenate([part.labels for _, part in parts]),
        splits=tuple(split for _, part in parts for split in part.splits),
        groups=tuple(f"{name}/{group}" for name, part in parts for group in part.groups),
        source=source,
    )


def accuracies(model: LanguageModel, sets: dict[str, LabelledExamples]) -> dict[str, Any]:
    """Return by set how many of its validation questions a model answers rightly."""
    from statistics import mean

    from expertsteer.evaluation import questions_of, score_questions

    found = {}
    for name, examples in sets.items():
        if (examples.labels < 0).any():
            questions = questions_of(examples, model, split="validation")
            rows = score_questions(model, questions)
            found[name] = {"n": len(rows)} | {
                metric: mean(row[metric] for row in rows)
                for metric in ("acc", "acc_norm", "probability")
            }
    return found


def train(
    model: LanguageModel, examples: LabelledExamples, method: Method, recipe: dict[str, Any]
) -> dict[str, Any]:
    """Train a model in place and return what the training did."""
    from expertsteer.fine_tuning import ADAPTER_RECORD, fine_tune, train_on_answers

    if method is Method.full:
        return asdict(train_on_answers(model, examples, **recipe))
    with tempfile.TemporaryDirectory() as scratch:
        folder = fine_tune(model, examples, output=Path(scratch) / "adapter", **recipe)
        from peft import PeftModel

        PeftModel.from_pretrained(model.model, str(folder)).merge_and_unload()
        return json.loads((folder / ADAPTER_RECORD).read_text(encoding="utf-8"))["training"]


def make_expert(
    data: Annotated[
        list[str],
        typer.Option("--data", "-d", help="A file or hub data set of questions; repeatable."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint.")],
    base: Annotated[
        str, typer.Option(help="A hub id, a folder, a .gguf file or an embedded name.")
    ] = "smollm2-135m-instruct",
    method: Annotated[
        Method, typer.Option(help="Train all parameters, or an adapter that is merged.")
    ] = Method.full,
    n_questions: Annotated[
        int, typer.Option(min=1, help="Most train questions, drawn from all data together.")
    ] = 400,
    n_validation: Annotated[
        int, typer.Option(min=1, help="Most validation questions, drawn likewise.")
    ] = 100,
    epochs: Annotated[int, typer.Option(min=1, help="The one of lowest validation loss.")] = 2,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 5e-5, with --method lora 5e-4.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a step.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the draws and the training.")] = 0,
) -> None:
    """Fine-tune a base model into an expert of a domain.

    The defaults take about 10 minutes on 2 cores, in float32. The folder appears whole or not
    at all; one that was made with the same settings is left as it is.
    """
    from expertsteer.cli.show import answer, say
    from expertsteer.errors import ParameterError
    from expertsteer.files import is_finished, replacing_folder, write_text
    from expertsteer.models import load_model
    from expertsteer.provenance import describe_machine, package_versions

    model = load_model(base, dtype="float32")
    end = model.tokenizer.eos_token or ""
    sets = {}
    for source in data:
        name = Path(source).stem
        if name in sets:
            raise ParameterError(f"Got two data sets {name!r}, but expected each name once.")
        sets[name] = load_questions(source, str(end), seed)
    learned = choose(sets, "train", n_questions, seed)
    held_out = choose(sets, "validation", n_validation, seed)
    examples = joined([*learned.items(), *held_out.items()], ", ".join(sets))
    recipe = {
        "n_epochs": epochs,
        "learning_rate": LEARNING_RATES[method] if learning_rate is None else learning_rate,
        "batch_tokens": batch_tokens,
        "seed": seed,
    }
    settings = {
        "base": model.description.to_dict(),
        "method": method.value,
        "data": list(sets),
        "questions": examples.fingerprint,
        **recipe,
    }
    if is_finished(output, RECORD, settings):
        say(f"{output} is finished already")
        return
    with replacing_folder(output) as scratch:
        before = accuracies(model, held_out)
        training = train(model, examples, method, recipe)
        after = accuracies(model, held_out)
        model.model.save_pretrained(scratch)
        model.tokenizer.save_pretrained(scratch)
        record = {
            "settings": settings,
            "n_questions": {name: len(set(part.groups)) for name, part in learned.items()},
            "training": training,
            "validation": {"before": before, "after": after},
            "versions": package_versions(),
            "machine": describe_machine(),
        }
        write_text(scratch / RECORD, json.dumps(record, indent=2) + "\n")
    first, *later = training["validation_loss"] or [None]
    if later:
        answer.print(f"validation loss: {first:.3f} before, {min(later):.3f} after")
    for name, values in before.items():
        answer.print(
            f"{name}: {values['n']} validation questions, acc {values['acc']:.3f} before, "
            f"{after[name]['acc']:.3f} after; acc_norm {values['acc_norm']:.3f}, "
            f"{after[name]['acc_norm']:.3f}",
            soft_wrap=True,
        )
    answer.print(f"{training['seconds']:.0f} s, {training['tokens_per_second']:.0f} tokens/s")
    say(f"checkpoint: {output}")


def main() -> None:
    """Run the command; a user's mistake is one line."""
    from expertsteer.cli.running import run_script

    run_script(make_expert)


if __name__ == "__main__":
    main()
