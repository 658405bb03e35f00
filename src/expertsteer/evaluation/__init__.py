"""Evaluation: what a vector does, and at what price."""

from expertsteer.evaluation.effect import perplexity, word_log_odds
from expertsteer.evaluation.preference import choose_by_preference, preference_gap, require_model

__all__ = [
    "choose_by_preference",
    "perplexity",
    "preference_gap",
    "require_model",
    "word_log_odds",
]
