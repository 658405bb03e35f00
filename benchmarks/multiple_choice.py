"""Score multiple-choice questions, against the lm-evaluation-harness's own model "hf".

Both score the same loaded model. "hf" runs with the batch size that was quickest for it on the
first questions, which is found before anything is timed. The questions are those of two
benchmarks, of two and of four choices, from the folder that the environment variable
``EXPERTSTEER_BENCHMARKS`` names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from timing import OURS, Case, Goal, main

from expertsteer.evaluation.harness import SteeredHarnessModel
from expertsteer.evaluation.multiple_choice import ChoiceTask, Question
from expertsteer.evaluation.tasks import load_task
from expertsteer.models import load_model

MODEL = "gemma-3-270m"
PEER = 'lm-eval "hf"'
BATCH_SIZES = (1, 8, 16, 32)
TUNING_QUESTIONS = 8
LEAST = {"persona_agreeableness": 2.0, "arc_easy": 3.0}


def requests_of(questions: list[Question]) -> list[Instance]:
    texts = [(question.prompt, answer) for question in questions for answer in question.answers]
    return [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(texts)]


def score(model: Any, questions: list[Question]) -> list[float]:
    answers = model.loglikelihood(requests_of(questions), disable_tqdm=True)
    return [value for value, _ in answers]


def prepare(name: str, n: int) -> Mapping[str, Callable[[], Any]]:
    model = load_model(MODEL, dtype="float32")
    task = load_task(name, model, limit=n)
    assert isinstance(task, ChoiceTask)
    questions = list(task.questions)

    def theirs(batch_size: int) -> HFLM:
        return HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)

    def seconds(batch_size: int) -> float:
        begun = time.perf_counter()
        score(theirs(batch_size), questions[:TUNING_QUESTIONS])
        return time.perf_counter() - begun

    score(theirs(1), questions[:1])
    quickest = theirs(min(BATCH_SIZES, key=seconds))
    return {
        OURS: partial(score, SteeredHarnessModel(model), questions),
        PEER: partial(score, quickest, questions),
    }


def compare(returned: dict[str, Any]) -> dict[str, float]:
    pairs = zip(returned[OURS], returned[PEER], strict=True)
    return {"largest difference of a log-likelihood": max(abs(a - b) for a, b in pairs)}


def cases(quick: bool) -> list[Case]:
    n = 8 if quick else 50
    return [
        Case(
            name=name,
            title=f"Score {n} questions, `{name}`",
            sizes={"model": MODEL, "dtype": "float32", "questions": n},
            prepare=partial(prepare, name, n),
            goals=(
                Goal(f"ratio {PEER} / {OURS}", at_least=least),
                Goal("largest difference of a log-likelihood", at_most=1e-3),
            ),
            compare=compare,
        )
        for name, least in LEAST.items()
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
