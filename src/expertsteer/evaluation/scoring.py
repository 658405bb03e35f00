"""Log-probabilities of a model's next tokens, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from expertsteer.data import RenderedText
from expertsteer.models import LanguageModel

__all__ = ["mean_log_likelihoods", "next_token_log_probabilities", "token_log_likelihoods"]

# The output head writes tokens x vocabulary numbers: 256 x 262,144 in float32 are 268 MB.
_HEAD_TOKENS = 256


@torch.inference_mode()
def next_token_log_probabilities(
    model: LanguageModel, texts: Sequence[str], tokens: torch.Tensor
) -> torch.Tensor:
    """Return the log-probabilities of some tokens right after each text.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    texts : sequence of str
    tokens : Tensor of shape (k,)
        Token ids.

    Returns
    -------
    Tensor of shape (n, k)
        float32, in nats.
    """
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    result = torch.empty(len(ids), len(tokens))
    for rows, batch, mask in _padded(model, ids):
        logits = model.model(input_ids=batch, attention_mask=mask, use_cache=False).logits
        last = mask.sum(1) - 1
        scores = logits[torch.arange(len(rows)), last].float().log_softmax(-1)
        result[rows] = scores[:, tokens.to(scores.device)].cpu()
    return result


@torch.inference_mode()
def token_log_likelihoods(
    model: LanguageModel, texts: Sequence[RenderedText]
) -> list[torch.Tensor]:
    """Return the log-likelihood of every token of every text, given those before it.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    texts : sequence of RenderedText

    Returns
    -------
    list of Tensor of shape (n_tokens - 1,)
        float32, in nats; the first token has nothing before it.
    """
    ids = [
        model.tokenizer(text.text, add_special_tokens=not text.has_special_tokens)["input_ids"][
            : model.context_length
        ]
        for text in texts
    ]
    result: list[torch.Tensor] = [torch.empty(0)] * len(ids)
    for rows, batch, mask in _padded(model, ids):
        logits = model.model(input_ids=batch, attention_mask=mask, use_cache=False).logits
        scores = logits[:, :-1].float().log_softmax(-1)
        found = scores.gather(-1, batch[:, 1:, None])[..., 0].cpu()
        for row, values in zip(rows, found, strict=True):
            result[row] = values[: len(ids[row]) - 1].clone()
    return result


def mean_log_likelihoods(model: LanguageModel, texts: Sequence[RenderedText]) -> torch.Tensor:
    """Return the mean log-likelihood a token of every text, shape (n,), in nats."""
    return torch.stack([scores.mean() for scores in token_log_likelihoods(model, texts)])


def _padded(
    model: LanguageModel, ids: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield row numbers, right-padded ids and mask; similar lengths together."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    start = 0
    while start < len(order):
        longest = len(ids[order[start]])
        rows = order[start : start + max(1, _HEAD_TOKENS // max(longest, 1))]
        batch = torch.full((len(rows), longest), model.pad_token_id)
        mask = torch.zeros_like(batch)
        for place, row in enumerate(rows):
            batch[place, : len(ids[row])] = torch.tensor(ids[row])
            mask[place, : len(ids[row])] = 1
        yield rows, batch.to(model.device), mask.to(model.device)
        start += len(rows)
