"""A benchmark in front of a model: states to make vectors from, questions to measure on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from expertsteer.calibration import validation_task
from expertsteer.data import EffectWords, LabelledExamples, load_examples, shipped_file
from expertsteer.errors import DataError, ParameterError
from expertsteer.evaluation.generations import GenerationTask, OpenPrompt
from expertsteer.evaluation.judges import ClassifierJudge, Judge, load_judge
from expertsteer.evaluation.labelled_texts import LabelledText, TextTask, labelled_texts_of
from expertsteer.evaluation.multiple_choice import ChoiceTask, is_questions, questions_of
from expertsteer.evaluation.open_answers import OpenQuestion, OpenTask, load_open_questions
from expertsteer.evaluation.word_odds import WordTask
from expertsteer.models import LanguageModel
from expertsteer.pipeline import render_corpus
from expertsteer.states import States, collect_states
from expertsteer.states.saved import SAVED_VERSION
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
    words : EffectWords or None
    judge : Judge or None
    """

    settings: BenchmarkSettings
    examples: LabelledExamples
    instruction: str
    n_test: int | None
    seed: int
    words: EffectWords | None = None
    judge: Judge | None = None

    @cached_property
    def fitting(self) -> LabelledExamples:
        """Train and validation rows."""
        return self.examples.for_fitting()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Fields of the test rows that tables may show, the usual one first."""
        if self.words is not None:
            return (*(("judged",) if self.judge else ()), "log_odds")
        if not is_questions(self.examples):
            return ("preference",)
        answered = ("exact_match",) if self.settings.open else ()
        return (*answered, "acc_norm", "acc", "log_odds")

    @property
    def metric(self) -> str:
        """The field of the test rows that tables show."""
        return self.settings.metric or self.metrics[0]

    @cached_property
    def constant(self) -> float | None:
        """Share of the test questions that one answer to all of them answers rightly.

        None where the questions do not all have the same answers to choose from.
        """
        test = self.examples.split("test")
        if self.words is not None or not is_questions(test):
            return None
        choices: dict[str, set[str]] = {}
        for group, answer in zip(test.groups, test.answers, strict=True):
            choices.setdefault(group, set()).add(answer)
        if len(set(map(frozenset, choices.values()))) > 1:
            return None
        right = Counter(a for a, label in zip(test.answers, test.labels, strict=True) if label > 0)
        return max(right.values()) / len(choices)

    def fingerprint(self) -> str:
        """Return a hash of all that is asked; 16 hexadecimal digits."""
        written = self.settings.open or self.judge is not None
        fields = {"open", "n_shots", "max_new_tokens"} if written else set[str]()
        asked = [
            self.examples.fingerprint,
            list(self.examples.splits),
            self.settings.model_dump(include=fields),
            dataclasses.asdict(self.words) if self.words else None,
            self.seed,
            *([self.judge.summary()] if self.judge else []),
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


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
    words = None
    if settings.words is not None:
        shipped = settings.words == "shipped"
        words = EffectWords.load(
            shipped_file("sentiment_effect.json") if shipped else settings.words
        )
    judge = None
    if settings.judge is not None:
        judge = load_judge(settings.judge, seed=seed)
        _require_independent(judge, settings, drawn)
    benchmark = Benchmark(settings, drawn, study.instruction(settings), n_test, seed, words, judge)
    if benchmark.metric not in benchmark.metrics:
        raise ParameterError(
            f"Got metric={benchmark.metric!r} for the benchmark {settings.name!r}, but expected "
            f"one of {', '.join(benchmark.metrics)}."
        )
    return benchmark


def _require_independent(
    judge: Judge, settings: BenchmarkSettings, examples: LabelledExamples
) -> None:
    if not isinstance(judge, ClassifierJudge):
        return
    shared = set(judge.examples.answers) & set(examples.answers)
    if shared:
        raise DataError(
            f"Got the judge {settings.judge!r} for the benchmark {settings.name!r}, which share "
            f"{len(shared)} texts, but expected a judge that was trained on others."
        )


class Measured(NamedTuple):
    """What the test questions of a benchmark gave.

    Attributes
    ----------
    values : dict of str to list of float
        Every metric, item by item in the task's order.
    n_cut : int
        Questions that lost their beginning, since they are longer than the model's window.
    n_unfinished : int
        Answers in words that reached the most tokens before they ended.
    """

    values: dict[str, list[float]]
    n_cut: int
    n_unfinished: int

    def to_dict(self) -> dict[str, Any]:
        """Return the part of a cell that this is."""
        return {"test": self.values, "n_cut": self.n_cut, "n_unfinished": self.n_unfinished}


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
    def validation(self) -> tuple[ChoiceTask | TextTask | WordTask, str]:
        """What effects are measured on, and the measure."""
        if self.benchmark.words is not None:
            return self._word_task(0), "log_odds"
        task, metric = validation_task(self.model, self.benchmark.examples)
        return (_balanced(task) if isinstance(task, TextTask) else task), metric

    @cached_property
    def test(self) -> list[Any]:
        """What figures come from; open answers are scored as right against wrong as well."""
        if self.benchmark.words is not None:
            return [self._word_task(1), *self._judged()]
        examples = self.benchmark.examples.split("test")
        if not is_questions(examples):
            return [_balanced(TextTask(tuple(labelled_texts_of(examples, self.model))))]
        tasks: list[Any] = [ChoiceTask(tuple(questions_of(examples, self.model, split="test")))]
        settings = self.benchmark.settings
        if settings.open:
            tasks.append(OpenTask(self._open_questions(tasks[0]), settings.max_new_tokens))
        return tasks

    def _open_questions(self, choices: ChoiceTask) -> tuple[OpenQuestion, ...]:
        """Return the same questions to be answered in words, in the same order."""
        settings = self.benchmark.settings
        questions = load_open_questions(
            settings.data or settings.name,
            columns=settings.columns,
            n_shots=settings.n_shots,
            seed=self.benchmark.seed,
        )
        by_question = {_asked(question.prompt): question for question in questions}
        return tuple(
            dataclasses.replace(by_question[_asked(choice.prompt)], name=choice.name)
            for choice in choices.questions
        )

    def _judged(self) -> list[GenerationTask]:
        """Return the same test prompts to be continued, where there is a judge."""
        if self.benchmark.judge is None:
            return []
        prompts = tuple(
            OpenPrompt(prompt.name, prompt.name, prompt.prompt, prompt.prompt)
            for prompt in self._word_task(1).questions
        )
        settings = self.benchmark.settings
        task = GenerationTask(
            prompts, (self.benchmark.judge,), max_new_tokens=settings.max_new_tokens
        )
        task.check(self.model, None)
        return [task]

    def _word_task(self, part: int) -> WordTask:
        """Return every second prompt: the even ones are for validation, the odd for test."""
        assert self.benchmark.words is not None
        whole = WordTask.from_words(self.benchmark.words)
        return dataclasses.replace(whole, questions=whole.questions[part::2])

    def measure(self, instruction: str = "") -> Measured:
        """Ask the test questions, behind an instruction if there is one."""
        found: dict[str, list[float]] = {}
        cut: set[str] = set()
        n_unfinished = 0
        for task in self.test:
            asked = instructed(task, instruction) if instruction else task
            rows: list[dict[str, Any]] = []
            asked.score(self.model, asked.questions, rows.extend, False)
            by_name = {row["name"]: row for row in rows}
            cut.update(row["name"] for row in rows if row.get("is_cut"))
            n_unfinished += sum(bool(row.get("is_unfinished")) for row in rows)
            for metric in asked.metrics:
                values = [float(by_name[question.name][metric]) for question in asked.questions]
                # Judges go by many names, and tables by one.
                is_judge = self.benchmark.judge is not None and metric == self.benchmark.judge.name
                found["judged" if is_judge else metric] = [round(value, 5) for value in values]
        return Measured(found, len(cut), n_unfinished)

    def asked(self) -> list[str]:
        """Return a hash of what every test item asks: items of several benchmarks may be one."""
        return [
            hashlib.sha256(_text_of(question).encode()).hexdigest()[:12]
            for question in self.test[0].questions
        ]

    def n_tokens_test(self) -> int | None:
        """Return the tokens of the test questions; None where some are answered in words."""
        (task, *others) = self.test
        if others:
            return None
        texts = [
            text
            for question in task.questions
            for text in (_text_of(question), *getattr(question, "answers", ()))
        ]
        return sum(map(len, self.model.tokenizer(texts, verbose=False)["input_ids"]))


def _text_of(question: Any) -> str:
    """Return what a question of any kind asks."""
    return question.text.text if isinstance(question, LabelledText) else question.prompt


def _balanced(task: TextTask) -> TextTask:
    """Return the first texts of a task, as many of either class.

    With classes of unequal size, whatever makes all texts less likely would count as a gain.
    """
    chosen = {
        label: [question for question in task.questions if question.label == label]
        for label in (1, -1)
    }
    both = zip(*chosen.values(), strict=False)
    return dataclasses.replace(task, questions=tuple(text for pair in both for text in pair))


def instructed(task: Any, instruction: str) -> Any:
    """Return a task whose questions stand behind an instruction."""
    if isinstance(task, TextTask):
        raise DataError(
            "Got the method 'prompt' on labelled texts, but expected questions or words: there is "
            "nothing to put an instruction before."
        )
    if isinstance(task, WordTask):
        questions = [question._replace(instruction=instruction) for question in task.questions]
    elif isinstance(task, GenerationTask):
        questions = [
            dataclasses.replace(question, text=f"{instruction}\n\n{question.prompt}")
            for question in task.questions
        ]
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
    read = [list(text) for text in texts]
    # What `states_key` says, of a model that is not loaded.
    identity = json.dumps([SAVED_VERSION, settings.identity(), settings.dtype, position, read])
    folder = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if model is None:
        return States.load(folder)
    return collect_states(model, texts, position=position, save_to=folder, progress=progress)


def _asked(prompt: str) -> str:
    """Return the question of a prompt, without solved ones before it and spaces behind it."""
    return prompt.rpartition("Question:")[2].strip()
