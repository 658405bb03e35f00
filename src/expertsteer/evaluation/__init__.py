"""Evaluation: what a vector does, and at what price."""

from expertsteer.evaluation.damage import Damage
from expertsteer.evaluation.effect import perplexity, word_log_odds
from expertsteer.evaluation.generations import (
    GenerationTask,
    OpenPrompt,
    continuation_perplexities,
    load_generations,
    repetition,
)
from expertsteer.evaluation.harness_run import (
    HarnessEvaluation,
    TaskEvaluation,
    evaluate_harness_tasks,
)
from expertsteer.evaluation.intervals import mean_interval
from expertsteer.evaluation.judges import ClassifierJudge, Judge, VaderJudge, load_judge
from expertsteer.evaluation.measurements import Measurement
from expertsteer.evaluation.multiple_choice import (
    ChoiceTask,
    Question,
    questions_of,
    score_questions,
)
from expertsteer.evaluation.open_answers import (
    OpenQuestion,
    OpenTask,
    answer_questions,
    load_open_questions,
)
from expertsteer.evaluation.preference import choose_by_preference, preference_gap, require_model
from expertsteer.evaluation.run import Evaluation, evaluate
from expertsteer.evaluation.scoring import (
    ContinuationScore,
    Request,
    TokenDamage,
    continuation_log_likelihoods,
    encode_request,
    token_divergences,
)
from expertsteer.evaluation.tasks import load_task

__all__ = [
    "ChoiceTask",
    "ClassifierJudge",
    "ContinuationScore",
    "Damage",
    "Evaluation",
    "GenerationTask",
    "HarnessEvaluation",
    "Judge",
    "Measurement",
    "OpenPrompt",
    "OpenQuestion",
    "OpenTask",
    "Question",
    "Request",
    "TaskEvaluation",
    "TokenDamage",
    "VaderJudge",
    "answer_questions",
    "choose_by_preference",
    "continuation_log_likelihoods",
    "continuation_perplexities",
    "encode_request",
    "evaluate",
    "evaluate_harness_tasks",
    "load_generations",
    "load_judge",
    "load_open_questions",
    "load_task",
    "mean_interval",
    "perplexity",
    "preference_gap",
    "questions_of",
    "repetition",
    "require_model",
    "score_questions",
    "token_divergences",
    "word_log_odds",
]
