"""Open generations: neutral prompts continued, then judged by what steering knows nothing of."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from expertsteer.data import load_prompts
from expertsteer.data.examples import fingerprint_of
from expertsteer.errors import ModelError, ParameterError
from expertsteer.evaluation.judges import Judge, load_judge
from expertsteer.evaluation.questions import QuestionBatch, in_batches
from expertsteer.evaluation.scoring import Request, continuation_log_likelihoods
from expertsteer.files import write_text
from expertsteer.generation import continue_prompts, require_room, sampling_options
from expertsteer.models import LanguageModel, ModelSource, load_model
from expertsteer.pack import SteeringPack

__all__ = [
    "GenerationTask",
    "OpenPrompt",
    "continuation_perplexities",
    "load_generations",
    "repetition",
]

_NGRAM = 4
# What a row holds beside the judges' scores.
_FIELDS = (
    "strength",
    "name",
    "group",
    "is_cut",
    "prompt",
    "text",
    "perplexity",
    "rep_4",
    "n_words",
)


@dataclass(frozen=True)
class OpenPrompt:
    """A prompt to continue once.

    Attributes
    ----------
    name : str
        Of the prompt and the sample.
    group : str
        Of the prompt: its samples are no independent items.
    prompt : str
    text : str
        The prompt as the model reads it.
    has_special_tokens : bool
        Whether a chat template has put them there.
    """

    name: str
    group: str
    prompt: str
    text: str
    has_special_tokens: bool = False


@dataclass(frozen=True)
class GenerationTask:
    """Prompts to continue and judges of what comes out, for `evaluate`.

    Attributes
    ----------
    questions : tuple of OpenPrompt
    judges : tuple of Judge
        Each with another name; they read the continuation without its prompt.
    fluency : LanguageModel, optional
        A third model, neither steered nor the target; it measures perplexity. None
        leaves it out.
    max_new_tokens : int, default=40
    temperature : float, default=0.0
        0 is greedy.
    top_p : float, default=1.0
        Nucleus of the sampling, from all tokens.
    batch_size : int, default=8
        Prompts at once.
    seed : int, default=0
        Of sampling, the same unsteered and steered, and of the blind sample.
    n_blind : int, default=10
        Prompts for people to read, see `write_blind_sample`.
    source : dict
        Where the prompts come from, for provenance.

    Raises
    ------
    ParameterError
        On settings out of range, two judges of a name, or several greedy continuations
        of a prompt, which would be the same.
    """

    questions: tuple[OpenPrompt, ...]
    judges: tuple[Judge, ...] = ()
    fluency: LanguageModel | None = None
    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    seed: int = 0
    n_blind: int = 10
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sampling_options(self.temperature, self.top_p)
        for name in ("max_new_tokens", "batch_size", "n_blind"):
            if getattr(self, name) < 1:
                raise ParameterError(f"Got {name}={getattr(self, name)}, but expected at least 1.")
        names = [judge.name for judge in self.judges]
        if len({*names, *_FIELDS}) < len(names) + len(_FIELDS):
            raise ParameterError(
                f"Got judges of the names {', '.join(names)}, but expected each once, and none of "
                f"{', '.join(_FIELDS)}. Drop or rename one."
            )
        if self.temperature == 0 and len({q.group for q in self.questions}) < len(self.questions):
            raise ParameterError(
                "Got several samples a prompt with temperature=0, which are all the same. "
                "Set a temperature, or n_samples=1."
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Fields of a row that are averaged."""
        fluency = () if self.fluency is None else ("perplexity",)
        return (*(judge.name for judge in self.judges), *fluency, "rep_4", "n_words")

    def summary(self) -> dict[str, Any]:
        """Return what decides the rows, as plain JSON types."""
        return {
            "kind": "generations",
            "fingerprint": fingerprint_of((q.name, q.text) for q in self.questions),
            "judges": [judge.summary() for judge in self.judges],
            "fluency": self.fluency.description.to_dict() if self.fluency else None,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            # What is sampled depends on what is in the batch.
            "batch_size": self.batch_size,
            "seed": self.seed,
            "n_blind": self.n_blind,
        } | self.source

    def check(self, model: LanguageModel, pack: SteeringPack | None) -> None:
        """Raise unless prompts fit, and judges and fluency model are independent.

        Parameters
        ----------
        model : LanguageModel
            The target.
        pack : SteeringPack or None

        Raises
        ------
        ModelError
            If the fluency model is the target.
        DataError
            If a judge was trained on the pack's data, or a prompt and its continuation do
            not fit the target's context.
        """
        longest = max(map(len, self._encoded(model, self.questions)))
        require_room(model, longest, self.max_new_tokens)
        third = self.fluency
        if third is not None and third.description.weights == model.description.weights:
            raise ModelError(
                f"Got the fluency model {third.name!r}, which is the target, but expected "
                "a third model: a target finds its own text fluent. Name another one."
            )
        if pack is None:
            return
        for judge in self.judges:
            judge.require_independent(pack)

    def score(
        self,
        model: LanguageModel,
        questions: Sequence[OpenPrompt],
        on_rows: Callable[[list[dict[str, Any]]], None],
        progress: bool,
    ) -> None:
        """Continue some of the prompts and judge the continuations.

        Parameters
        ----------
        model : LanguageModel
            Steered or not.
        questions : sequence of OpenPrompt
            Some of this task's.
        on_rows : callable
            Called with the rows of each batch as soon as it is finished: ``name``,
            ``group``, ``is_cut`` (never: `check` refuses prompts that do not fit),
            ``prompt``, ``text``, a score for every judge by its name, ``perplexity`` (see
            `continuation_perplexities`), ``rep_4`` (see `repetition`) and ``n_words``.
        progress : bool
        """
        wanted = {question.name for question in questions}
        with tqdm(total=len(wanted), desc="generating", delay=1, disable=not progress) as bar:
            # All of the task's prompts and not only those left decide what shares a batch, so
            # that a run that was interrupted samples what a run at one go does.
            for batch in self.batches(model):
                left = wanted.intersection(q.name for q in batch.questions)
                if left:
                    rows = self.score_batch(model, batch)
                    on_rows([row for row in rows if row["name"] in left])
                    bar.update(len(left))

    def batches(self, model: LanguageModel) -> list[QuestionBatch[OpenPrompt]]:
        """Return all prompts in batches."""
        encoded = self._encoded(model, self.questions)
        return in_batches(self.questions, [len(ids) for ids in encoded], self.batch_size)

    def score_batch(
        self, model: LanguageModel, batch: QuestionBatch[OpenPrompt]
    ) -> list[dict[str, Any]]:
        """Continue the prompts of a batch and judge the continuations; see `score`."""
        texts = continue_prompts(
            model,
            self._encoded(model, batch.questions),
            self.max_new_tokens,
            seed=self.seed + batch.start,
            **sampling_options(self.temperature, self.top_p),
        )
        return self._rows(batch.questions, texts)

    def _encoded(self, model: LanguageModel, prompts: Sequence[OpenPrompt]) -> list[list[int]]:
        return [
            model.tokenizer(q.text, add_special_tokens=not q.has_special_tokens, verbose=False)[
                "input_ids"
            ]
            for q in prompts
        ]

    def _rows(self, prompts: Sequence[OpenPrompt], texts: Sequence[str]) -> list[dict[str, Any]]:
        rows = [
            {"name": q.name, "group": q.group, "is_cut": False, "prompt": q.prompt, "text": text}
            for q, text in zip(prompts, texts, strict=True)
        ]
        columns: dict[str, Sequence[Any]] = {j.name: j.score(texts) for j in self.judges}
        if self.fluency is not None:
            # A chat's answer stands in a line of its own.
            befores = [q.prompt + "\n" * q.has_special_tokens for q in prompts]
            columns["perplexity"] = continuation_perplexities(self.fluency, befores, texts)
        columns["rep_4"] = [repetition(text) for text in texts]
        columns["n_words"] = [len(text.split()) for text in texts]
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        return rows

    def write_blind_sample(self, rows: Sequence[dict[str, Any]], folder: Path) -> None:
        """Write texts for people to compare without knowing which are steered.

        ``blind.md`` holds a seeded sample of the prompts, each with its text at every
        strength in random order under letters, ``blind_key.json`` which is which. A run
        at one strength has nothing to compare, and nothing is written.

        Parameters
        ----------
        rows : sequence of dict
            Of all strengths.
        folder : Path
        """
        strengths = list(dict.fromkeys(row["strength"] for row in rows))
        if len(strengths) < 2:
            return
        found = {(row["name"], row["strength"]): row["text"] for row in rows}
        firsts = list({q.group: q for q in reversed(self.questions)}.values())[::-1]
        rng = random.Random(self.seed)
        lines = [
            "# Which text is steered?",
            "",
            "Every prompt has one unsteered text; letters are in random order for each prompt. "
            "The key is in blind_key.json.",
        ]
        key: list[dict[str, Any]] = []
        for number, question in enumerate(rng.sample(firsts, min(self.n_blind, len(firsts))), 1):
            order = rng.sample(strengths, len(strengths))
            letters = {_letters(place): strength for place, strength in enumerate(order)}
            key.append({"number": number, "name": question.name, "strengths": letters})
            lines += ["", f"## {number}", "", *_fenced(question.prompt)]
            for letter, strength in letters.items():
                lines += ["", f"**{letter}**", "", *_fenced(found[question.name, strength])]
        write_text(folder / "blind.md", "\n".join(lines) + "\n")
        write_text(folder / "blind_key.json", json.dumps(key, indent=2))


def load_generations(
    source: str | Path,
    model: LanguageModel,
    *,
    judges: Sequence[str | Judge] = (),
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    positive: str | None = None,
    negative: str | None = None,
    kind: str = "auto",
    encoder: str | Path | None = None,
    fluency: str | ModelSource | LanguageModel | None = None,
    n_samples: int = 1,
    chat_template: bool = False,
    limit: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> GenerationTask:
    """Load prompts to continue, and what judges the continuations.

    Parameters
    ----------
    source : str or Path
        The prompts, see `load_prompts`.
    model : LanguageModel
        The target; supplies the chat template.
    judges : sequence of str or Judge
        Names and files as in `load_judge`.
    columns, roles, positive, negative, kind, encoder
        Of judges that are trained on a file, see `load_judge`.
    fluency : str, ModelSource or LanguageModel, optional
        See `GenerationTask`.
    n_samples : int, default=1
        Continuations a prompt.
    chat_template : bool, default=False
        Each prompt becomes a user's turn.
    limit : int, optional
        Most prompts, drawn at random.
    seed : int, default=0
        Of all draws.
    **settings
        Further fields of `GenerationTask`.

    Returns
    -------
    GenerationTask

    Raises
    ------
    DataError
        If a file is unusable or empty.
    ModelError
        If a model or a package is missing.
    ParameterError
        On an unknown judge or settings out of range.
    """
    prompts = list(enumerate(load_prompts(source)))
    if limit is not None and limit < len(prompts):
        prompts = sorted(random.Random(seed).sample(prompts, limit))
    questions = [
        OpenPrompt(
            f"prompt {number}, sample {sample}",
            f"prompt {number}",
            prompt,
            model.chat_prompt([{"role": "user", "content": prompt}]) if chat_template else prompt,
            chat_template,
        )
        for number, prompt in prompts
        for sample in range(n_samples)
    ]
    task = GenerationTask(
        tuple(questions), seed=seed, source={"source": Path(source).name}, **settings
    )
    options: dict[str, Any] = {
        "columns": columns,
        "roles": roles,
        "positive": positive,
        "negative": negative,
        "kind": kind,
        "encoder": encoder,
        "seed": seed,
    }
    loaded = tuple(load_judge(j, **options) if isinstance(j, str) else j for j in judges)
    third = None if fluency is None else load_model(fluency)
    return dataclasses.replace(task, judges=loaded, fluency=third)


def continuation_perplexities(
    model: LanguageModel, prompts: Sequence[str], continuations: Sequence[str]
) -> list[float | None]:
    """Return the perplexity of continuations given their prompts.

    Parameters
    ----------
    model : LanguageModel
        Neither steered nor the one that wrote them.
    prompts, continuations : sequence of str

    Returns
    -------
    list of float or None
        exp of the mean negative log-likelihood a token of this model; None for a
        continuation without text. What does not fit the model's context is left out: of
        a prompt the beginning, of a continuation the end. A warning says of how many.
    """
    n_cut = 0
    requests: list[Request] = []
    places: list[int] = []
    for place, (prompt, text) in enumerate(zip(prompts, continuations, strict=True)):
        before, whole = model.tokenizer([prompt, prompt + text], verbose=False)["input_ids"]
        # The seam may lie within a token of this model: "feel" and "ing" become "feeling".
        # The first token has nothing to be predicted from.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        start = max(1, len(list(same)))
        tokens = tuple(whole[start:][: model.context_length])
        if text.strip() and tokens:
            # The newest token is predicted and never read.
            room = model.context_length - len(tokens) + 1
            n_cut += start > room or len(whole) - start > len(tokens)
            requests.append(Request(tuple(whole[:start][-room:]), (tokens,)))
            places.append(place)
    if n_cut:
        warnings.warn(
            f"{n_cut} of {len(prompts)} texts do not fit the {model.context_length} tokens of "
            f"{model.name} with their prompts; their perplexity is of a part.",
            stacklevel=2,
        )
    result: list[float | None] = [None] * len(prompts)
    scores = continuation_log_likelihoods(model, requests, progress=False)
    for place, request, (score,) in zip(places, requests, scores, strict=True):
        result[place] = math.exp(-score.log_likelihood / len(request.continuations[0]))
    return result


def repetition(text: str) -> float:
    """Return the share of a text's 4-grams of words that have occurred before in it.

    Returns
    -------
    float
        1 - distinct 4-grams / 4-grams; 0 for a text of fewer than four words.

    Notes
    -----
    Source: seq-rep-4 (Welleck et al. 2020, arXiv 1908.04319), over words in place of tokens
    so that it does not depend on a tokenizer.
    """
    words = text.split()
    grams = [tuple(words[n : n + _NGRAM]) for n in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _letters(place: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    rest, letter = divmod(place, 26)
    return (_letters(rest - 1) if rest else "") + chr(ord("A") + letter)


def _fenced(text: str) -> list[str]:
    """Return a text between fences that nothing in it can close."""
    fence = "~" * 3
    while fence in text:
        fence += "~"
    return [f"{fence}text", *text.strip("\n").splitlines(), fence]
