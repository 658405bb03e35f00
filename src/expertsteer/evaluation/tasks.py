"""Load what to evaluate: questions with choices, or to answer in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from expertsteer.data import BENCHMARKS
from expertsteer.data.formats import examples_of, load_rows
from expertsteer.data.kinds import kind_of
from expertsteer.errors import ParameterError
from expertsteer.evaluation.multiple_choice import ChoiceTask, questions_of
from expertsteer.evaluation.open_answers import OpenTask, open_questions_of
from expertsteer.models import LanguageModel

__all__ = ["load_task"]


def load_task(
    source: str | Path,
    model: LanguageModel,
    *,
    kind: str = "auto",
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    letters: bool = False,
    n_shots: int = 0,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> ChoiceTask | OpenTask:
    """Load questions to choose an answer to, or to answer in words.

    Parameters
    ----------
    source : str or Path
        A file, benchmark or hub data set, see `load_examples` and `load_open_questions`.
    model : LanguageModel
        Supplies the chat template.
    kind : str, default="auto"
        As in `load_examples`; rows of the kind "open_answer" are answered in words. "auto"
        goes by the columns, or by the benchmark where the source is one.
    split : {"test", "validation", "train"}, default="test"
    columns, roles, folder
        As in `load_examples`.
    letters : bool, default=False
        Of questions with choices alone, see `ChoiceTask`.
    n_shots : int, default=0
    max_new_tokens : int, optional
        Of open answers alone, see `load_open_questions` and `OpenTask`; default: 256.
    batch_size : int, default=8
        Open answers at once.
    chat_template : bool, default=False
    limit : int, optional
        Most questions, drawn at random.
    seed : int, default=0
        Of the draws.

    Returns
    -------
    ChoiceTask or OpenTask

    Raises
    ------
    DataError
        If the file is unusable or the split empty.
    ParameterError
        On a setting that questions of this kind have no use of.
    """
    origin = Path(source).name if Path(source).exists() else str(source)
    asked = {"split": split, "limit": limit, "seed": seed, "chat_template": chat_template}
    about = {"source": origin} | asked
    rows = load_rows(source, columns=columns, roles=roles, folder=folder)
    if kind == "auto" and str(source) in BENCHMARKS:
        kind = BENCHMARKS[str(source)].kind
    kind = kind_of(rows, kind, str(source))
    is_open = kind == "open_answer"
    idle = (
        {"letters": letters} if is_open else {"n_shots": n_shots, "max_new_tokens": max_new_tokens}
    )
    for name, value in idle.items():
        if value:
            raise ParameterError(
                f"Got {name}={value} for {origin}, whose questions are "
                f"{'answered in words' if is_open else 'scored by the likelihood of their choices'}"
                ", but expected it left out: it would change nothing."
            )
    if is_open:
        opened = open_questions_of(
            rows, str(source), split=split, n_shots=n_shots, limit=limit, seed=seed
        )
        if chat_template:
            opened = [
                dataclasses.replace(
                    question,
                    prompt=model.chat_prompt([{"role": "user", "content": question.prompt}]),
                    has_special_tokens=True,
                )
                for question in opened
            ]
        return OpenTask(
            tuple(opened), max_new_tokens or 256, batch_size, about | {"n_shots": n_shots}
        )
    examples = examples_of(rows, kind, str(source), seed=seed)
    questions = questions_of(
        examples, model, split=split, chat_template=chat_template, limit=limit, seed=seed
    )
    return ChoiceTask(tuple(questions), letters, about)
