"""Evaluation: what a vector does, and at what price."""

from expertsteer.evaluation.effect import perplexity, word_log_odds
from expertsteer.evaluation.intervals import mean_interval
from expertsteer.evaluation.multiple_choice import Question, questions_of, score_questions
from expertsteer.evaluation.preference import choose_by_preference, preference_gap, require_model
from expertsteer.evaluation.run import Evaluation, Measurement, evaluate
from expertsteer.evaluation.scoring import (
    ContinuationScore,
    Request,
    TokenDamage,
    continuation_log_likelihoods,
    encode_request,
    token_divergences,
)

__all__ = [
    "ContinuationScore",
    "Evaluation",
    "Measurement",
    "Question",
    "Request",
    "TokenDamage",
    "choose_by_preference",
    "continuation_log_likelihoods",
    "encode_request",
    "evaluate",
    "mean_interval",
    "perplexity",
    "preference_gap",
    "questions_of",
    "require_model",
    "score_questions",
    "token_divergences",
    "word_log_odds",
]
