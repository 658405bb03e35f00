"""Load what to evaluate: questions with choices, or to answer in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from expertsteer.data import load_examples
from expertsteer.data.formats import rename_columns
from expertsteer.data.readers import read_rows
from expertsteer.evaluation.multiple_choice import ChoiceTask, questions_of
from expertsteer.evaluation.open_answers import OpenTask, load_open_questions
from expertsteer.models import LanguageModel

__all__ = ["load_task"]


def load_task(
    source: str | Path,
    model: LanguageModel,
    *,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    letters: bool = False,
    n_shots: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    chat_template: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> ChoiceTask | OpenTask:
    """Load questions; rows with a question and an answer but no choices are open ones.

    Parameters
    ----------
    source : str or Path
        A file or hub data set, see `load_examples` and `load_open_questions`.
    model : LanguageModel
        Supplies the chat template.
    split : {"test", "validation", "train"}, default="test"
    columns : mapping of str to str, optional
        From a field to the file's column.
    letters : bool, default=False
        See `ChoiceTask`.
    n_shots, max_new_tokens, batch_size : int
        See `load_open_questions` and `OpenTask`.
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
    """
    origin = Path(source).name if Path(source).exists() else str(source)
    asked = {"split": split, "limit": limit, "seed": seed, "chat_template": chat_template}
    about = {"source": origin} | asked
    _, first = rename_columns(read_rows(source), columns or {})[0]
    if "question" in first and "choices" not in first:
        opened = load_open_questions(
            source, split=split, columns=columns, n_shots=n_shots, limit=limit, seed=seed
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
        return OpenTask(tuple(opened), max_new_tokens, batch_size, about | {"n_shots": n_shots})
    examples = load_examples(source, columns=columns, seed=seed)
    questions = questions_of(
        examples, model, split=split, chat_template=chat_template, limit=limit, seed=seed
    )
    return ChoiceTask(tuple(questions), letters, about)
