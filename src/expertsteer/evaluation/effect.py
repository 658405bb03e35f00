"""What steering does: the wanted words' odds, and the damage to plain text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from expertsteer.data import EffectWords, RenderedText
from expertsteer.errors import DataError
from expertsteer.evaluation.scoring import next_token_log_probabilities, token_log_likelihoods
from expertsteer.models import LanguageModel

__all__ = ["perplexity", "word_log_odds"]


def word_log_odds(model: LanguageModel, words: EffectWords) -> torch.Tensor:
    r"""Return the log-odds of positive over negative words after every prompt.

    .. math:: \log \sum_{w \in P} p(w \mid x) - \log \sum_{w \in N} p(w \mid x)

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    words : EffectWords
        Prompts and words. A word counts where it is one token with a space before it.

    Returns
    -------
    Tensor of shape (n_prompts,)
        In nats.

    Raises
    ------
    DataError
        If no positive or no negative word is one token.
    """
    positive = _single_tokens(model, words.positive_words, "positive")
    negative = _single_tokens(model, words.negative_words, "negative")
    scores = next_token_log_probabilities(model, words.prompts, torch.tensor(positive + negative))
    return scores[:, : len(positive)].logsumexp(1) - scores[:, len(positive) :].logsumexp(1)


def perplexity(model: LanguageModel, sentences: Sequence[str]) -> float:
    """Return the perplexity of sentences: exp of the mean negative log-likelihood a token.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    sentences : sequence of str

    Returns
    -------
    float
    """
    texts = [RenderedText(sentence, 0, False) for sentence in sentences]
    return float(torch.cat(token_log_likelihoods(model, texts)).mean().neg().exp())


def _single_tokens(model: LanguageModel, words: Sequence[str], kind: str) -> list[int]:
    tokens = []
    for word in words:
        ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            tokens.append(ids[0])
    if not tokens:
        raise DataError(
            f"Got {len(words)} {kind} words of which none is a single token of {model.name}, but "
            "expected at least one. Use commoner words."
        )
    if len(tokens) < len(words) / 2:
        warnings.warn(
            f"Only {len(tokens)} of {len(words)} {kind} words are single tokens of {model.name}.",
            stacklevel=3,
        )
    return tokens
