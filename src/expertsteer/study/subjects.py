"""A benchmark in front of a model: states to make vectors from, questions to measure on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from expertsteer.calibration import validation_task
from expertsteer.data import LabelledExamples, load_examples
from expertsteer.evaluation.labelled_texts import TextTask, labelled_texts_of
from expertsteer.evaluation.multiple_choice import ChoiceTask, is_questions, questions_of
from expertsteer.evaluation.open_answers import OpenTask, load_open_questions
from expertsteer.models import LanguageModel
from expertsteer.pipeline import render_corpus
from expertsteer.states import States, collect_states
from expertsteer.study.drawing import draw_examples
from expertsteer.study.settings import BenchmarkSettings, ModelSettings, StudySettings

__all__ = ["Benchmark", "Subject", "collect_corpus", "load_benchmark"]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A data set's questions as drawn for one seed of the study.

    Attributes
    ----------
    settings : BenchmarkSettings
    examples : LabelledExamples
        Right and wrong answers (or labelled texts) of all three splits.
    instruction : str
        For the method "prompt".
    n_test : int or None
    seed : int
    """

    settings: BenchmarkSettings
    examples: LabelledExamples
    instruction: str
    n_test: int | None
    seed: int

    @cached_property
    def fitting(self) -> LabelledExamples:
        """Train and validation rows."""
        return self.examples.for_fitting()

    @property
    def metric(self) -> str:
        """The field of the test rows that tables show."""
        if self.settings.metric:
            return self.settings.metric
        if self.settings.open:
            return "exact_match"
        return "acc_norm" if is_questions(self.examples) else "preference"


def load_benchmark(study: StudySettings, settings: BenchmarkSettings, seed: int) -> Benchmark:
    """Load a data set and draw its questions.

    Raises
    ------
    DataError
        On an unusable file, an unknown name or an empty split.
    """
    examples = load_examples(
        settings.data or settings.name,
        kind="open_answer" if settings.open else settings.kind,
        columns=settings.columns,
        positive=settings.positive,
        negative=settings.negative,
        seed=seed,
    )
    n_test = settings.n_test or study.n_test
    drawn = draw_examples(
        examples,
        settings.n_train or study.n_train,
        settings.n_validation or study.n_validation,
        n_test,
        seed,
    )
    return Benchmark(settings, drawn, study.instruction(settings), n_test, seed)


class Subject:
    """A model in front of a benchmark.

    Parameters
    ----------
    model : LanguageModel
    benchmark : Benchmark
    """

    def __init__(self, model: LanguageModel, benchmark: Benchmark) -> None:
        self.model = model
        self.benchmark = benchmark

    @cached_property
    def validation(self) -> tuple[ChoiceTask | TextTask, str]:
        """What effects are measured on, and the measure."""
        return validation_task(self.model, self.benchmark.examples)

    @cached_property
    def test(self) -> list[Any]:
        """What figures come from; open answers are scored as right against wrong as well."""
        examples = self.benchmark.examples.split("test")
        if not is_questions(examples):
            return [TextTask(tuple(labelled_texts_of(examples, self.model)))]
        tasks: list[Any] = [ChoiceTask(tuple(questions_of(examples, self.model, split="test")))]
        settings = self.benchmark.settings
        if settings.open:
            questions = load_open_questions(
                settings.data or settings.name,
                columns=settings.columns,
                n_shots=settings.n_shots,
                limit=self.benchmark.n_test,
                seed=self.benchmark.seed,
            )
            tasks.append(OpenTask(tuple(questions), settings.max_new_tokens))
        return tasks

    def measure(self, instruction: str = "") -> dict[str, list[float]]:
        """Return every metric of the test questions, item by item in the task's order."""
        found: dict[str, list[float]] = {}
        for task in self.test:
            asked = instructed(task, instruction) if instruction else task
            rows: list[dict[str, Any]] = []
            asked.score(self.model, asked.questions, rows.extend, False)
            by_name = {row["name"]: row for row in rows}
            for metric in asked.metrics:
                values = [float(by_name[question.name][metric]) for question in asked.questions]
                found[metric] = [round(value, 5) for value in values]
        return found


def instructed(task: Any, instruction: str) -> Any:
    """Return a task whose questions stand behind an instruction."""
    if isinstance(task, TextTask):
        questions = [question._replace(instruction=instruction) for question in task.questions]
    else:
        questions = [
            dataclasses.replace(question, prompt=f"{instruction}\n\n{question.prompt}")
            for question in task.questions
        ]
    return dataclasses.replace(task, questions=tuple(questions))


def collect_corpus(
    model: LanguageModel | None,
    settings: ModelSettings,
    corpus: LabelledExamples | list[str],
    position: str,
    cache_dir: Path,
    progress: bool = True,
) -> States:
    """Return the states of a model on a corpus, read once and kept.

    Parameters
    ----------
    model : LanguageModel or None
        None: they are there already, since a model is loaded for one part of a study only.
    settings : ModelSettings
        Its name, which the states are found by.
    corpus : LabelledExamples or list of str
    position : {"last", "answer_mean", "prompt_last"}
    cache_dir : Path
    progress : bool, default=True

    Returns
    -------
    States
    """
    texts = render_corpus(corpus)
    identity = json.dumps([settings.model_dump(), position, [list(text) for text in texts]])
    folder = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if model is None:
        return States.load(folder)
    return collect_states(model, texts, position=position, save_to=folder, progress=progress)
