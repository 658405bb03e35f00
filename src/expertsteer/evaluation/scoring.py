"""Log-probabilities of a model's next tokens.

Only wanted positions reach the output head, and never more than 512 of them at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from tqdm.auto import tqdm

from expertsteer.data import RenderedText
from expertsteer.errors import DataError
from expertsteer.models import LanguageModel, replaced_forward
from expertsteer.models.batches import (
    BATCH_TOKENS,
    HEAD_POSITIONS,
    continuation_batches,
    padded,
    position_ids,
    real_places,
    to_device,
    token_batches,
)

__all__ = [
    "ContinuationScore",
    "Request",
    "TokenDamage",
    "continuation_log_likelihoods",
    "encode_request",
    "head_sees",
    "mean_log_likelihoods",
    "next_token_log_probabilities",
    "request_sizes",
    "token_divergences",
    "token_log_likelihoods",
    "warn_of_cut_prompts",
    "whole_text_batches",
]

# Rows of the head's output that are brought to float32 at a time.
_FLOAT32_ROWS = 64


class Request(NamedTuple):
    """A context and what may follow it, as token ids."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class ContinuationScore(NamedTuple):
    """How likely a continuation is.

    Attributes
    ----------
    log_likelihood : float
        Sum over its tokens, in nats.
    is_greedy : bool
        Whether greedy decoding would have written it.
    """

    log_likelihood: float
    is_greedy: bool


def encode_request(
    model: LanguageModel, prompt: str, answers: Sequence[str], *, has_special_tokens: bool = False
) -> tuple[Request, bool]:
    """Tokenise a prompt and its possible answers the way lm-eval does.

    An answer's tokens are those that the whole text has beyond the prompt's, so that a
    token is never cut at the seam's wrong side.

    Parameters
    ----------
    model : LanguageModel
        Supplies the tokenizer and the context length.
    prompt : str
        Spaces at its end count as the answers' beginning.
    answers : sequence of str
    has_special_tokens : bool, default=False
        Whether a chat template has put them there.

    Returns
    -------
    request : Request
    is_cut : bool
        Whether the prompt lost its beginning because the longest answer would not have
        fitted the context with it.

    Raises
    ------
    DataError
        If an answer has no tokens of its own, or more than the context holds.
    """
    stripped = prompt.rstrip()
    answers = [prompt[len(stripped) :] + answer for answer in answers]
    special: dict[str, Any] = {"add_special_tokens": not has_special_tokens, "verbose": False}
    context = model.tokenizer(stripped, **special)["input_ids"]
    continuations = []
    for answer in answers:
        tokens = model.tokenizer(stripped + answer, **special)["input_ids"][len(context) :]
        if not tokens:
            raise DataError(
                f"Got the answer {answer!r} without a token of its own after a prompt, but "
                "expected one or more. Mend or remove the row."
            )
        continuations.append(tuple(tokens))
    # The newest token is predicted and never read.
    longest = max(map(len, continuations))
    room = model.context_length - longest + 1
    if room < 1:
        raise DataError(
            f"Got an answer of {longest} tokens, but the context of {model.name} holds "
            f"{model.context_length}. Shorten or remove the row."
        )
    return Request(tuple(context[-room:]), tuple(continuations)), len(context) > room


def warn_of_cut_prompts(model: LanguageModel, n_cut: int, n_prompts: int) -> None:
    """Warn how many prompts lose their beginning, if any."""
    if n_cut:
        warnings.warn(
            f"{n_cut} of {n_prompts} prompts are longer than the context of {model.name} and "
            "lose their beginning.",
            stacklevel=3,
        )


class TokenDamage(NamedTuple):
    """What steering does to the predictions of a text's tokens, tensors of shape (n_tokens - 1,).

    Attributes
    ----------
    log_likelihood, steered_log_likelihood : Tensor
        Of the tokens, in nats.
    divergence : Tensor
        KL divergence of the steered from the unsteered next-token distribution, in nats.
    is_cut : bool
        Whether the text lost its end because it did not fit the context.
    """

    log_likelihood: torch.Tensor
    steered_log_likelihood: torch.Tensor
    divergence: torch.Tensor
    is_cut: bool


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
    ids = [tuple(model.tokenizer(text)["input_ids"]) for text in texts]
    result = torch.empty(len(ids), len(tokens))
    for rows in token_batches([len(row) for row in ids], head_positions=[1] * len(ids)):
        lengths = [len(ids[row]) for row in rows]
        batch, mask = padded(model, [ids[row] for row in rows], "right")
        with head_sees(model, torch.arange(len(rows)), torch.tensor(lengths) - 1):
            inputs = _inputs(batch, mask, lengths)
            logits = model.model(**inputs, use_cache=False).logits[0]
        scores = logits.float().log_softmax(-1)
        result[rows] = scores[:, tokens.to(scores.device)].cpu()
    return result


@torch.inference_mode()
def token_log_likelihoods(
    model: LanguageModel, texts: Sequence[RenderedText], *, warn: bool = True
) -> list[torch.Tensor]:
    """Return the log-likelihood of every token of every text, given those before it.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    texts : sequence of RenderedText
    warn : bool, default=True
        Whether to warn of texts that do not fit the context.

    Returns
    -------
    list of Tensor of shape (n_tokens - 1,)
        float32, in nats; the first token has nothing before it.

    Notes
    -----
    A text that does not fit the context loses its end; a warning says how many do.
    """
    ids, _ = _tokenised(model, texts, warn)
    return [values for values, _ in _read_whole(model, ids)]


@torch.inference_mode()
def token_divergences(
    model: LanguageModel,
    texts: Sequence[RenderedText],
    steering: AbstractContextManager[Any] | None,
    *,
    warn: bool = True,
) -> list[TokenDamage]:
    """Return what steering does to the next-token distributions in every text.

    Parameters
    ----------
    model : LanguageModel
        Unsteered.
    texts : sequence of RenderedText
    steering : context manager or None
        Steers the model while it is entered; entered and left once a batch. None: no
        damage, and every text is read once.
    warn : bool, default=True
        Whether to warn of texts that do not fit the context.

    Returns
    -------
    list of TokenDamage
        One a text.

    Notes
    -----
    A text that does not fit the context loses its end; a warning says how many do.
    """
    ids, is_cut = _tokenised(model, texts, warn)
    nothing = torch.empty(0)
    result = [TokenDamage(nothing, nothing, nothing, False)] * len(ids)
    for batch in _whole_batches(model, ids):
        plain = batch.read(model)
        both = ((logits, logits) for logits in plain.logits())
        if steering is not None:
            with steering:
                steered = batch.read(model)
            both = zip(plain.logits(), steered.logits(), strict=True)
        found = []
        following = batch.following.split(HEAD_POSITIONS)
        for (before, after), tokens in zip(both, following, strict=True):
            likelihoods = [_gather(logits, tokens)[0] for logits in (before, after)]
            found.append((*likelihoods, _divergence(before, after)))
        parts = [torch.cat(values).cpu().split(batch.sizes) for values in zip(*found, strict=True)]
        for row, *values in zip(batch.rows, *parts, strict=True):
            result[row] = TokenDamage(*values, is_cut=is_cut[row])
    return result


def whole_text_batches(model: LanguageModel, texts: Sequence[RenderedText]) -> list[list[int]]:
    """Return which texts are read together as whole texts; warn of texts that are too long.

    A batch given to `token_divergences` or `token_log_likelihoods` alone is read as it is among
    all.
    """
    ids, _ = _tokenised(model, texts)
    lengths = [max(len(row) - 1, 0) for row in ids]
    return list(token_batches(lengths, head_positions=lengths))


def _divergence(plain: torch.Tensor, steered: torch.Tensor) -> torch.Tensor:
    """Return KL(plain || steered) of every row, in nats."""
    found = []
    for p, q in zip(plain.split(_FLOAT32_ROWS), steered.split(_FLOAT32_ROWS), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


def _tokenised(
    model: LanguageModel, texts: Sequence[RenderedText], warn: bool = True
) -> tuple[list[list[int]], list[bool]]:
    """Return the texts' tokens, and which texts the context was too short for."""
    whole = [
        model.tokenizer(text.text, add_special_tokens=not text.has_special_tokens, verbose=False)[
            "input_ids"
        ]
        for text in texts
    ]
    is_cut = [len(ids) > model.context_length for ids in whole]
    if warn and any(is_cut):
        warnings.warn(
            f"{sum(is_cut)} of {len(texts)} texts are longer than the context of {model.name} and "
            "lose their end.",
            stacklevel=3,
        )
    return [ids[: model.context_length] for ids in whole], is_cut


@dataclass(frozen=True)
class _WholeBatch:
    """Texts of which every token but the first is predicted."""

    rows: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    following: torch.Tensor
    sizes: list[int]

    def read(self, model: LanguageModel) -> _Predicted:
        inputs = _inputs(self.ids, self.mask, self.sizes)
        where = real_places(self.sizes)
        return _Predicted(model, *_decode(model, *where, **inputs, use_cache=False))


def _whole_batches(model: LanguageModel, ids: Sequence[Sequence[int]]) -> Iterator[_WholeBatch]:
    scored = [row for row in range(len(ids)) if len(ids[row]) > 1]
    lengths = [len(ids[row]) - 1 for row in scored]
    for places in token_batches(lengths, head_positions=lengths):
        rows = [scored[place] for place in places]
        batch, mask = padded(model, [ids[row][:-1] for row in rows], "right")
        following = torch.tensor([token for row in rows for token in ids[row][1:]])
        yield _WholeBatch(rows, batch, mask, following, [len(ids[row]) - 1 for row in rows])


def _read_whole(
    model: LanguageModel, ids: Sequence[Sequence[int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return every token's log-probability, and whether it is the likeliest, but the first's."""
    result = [(torch.empty(0), torch.empty(0, dtype=torch.bool))] * len(ids)
    for batch in _whole_batches(model, ids):
        found = batch.read(model).gather(batch.following)
        values, greedy = (part.split(batch.sizes) for part in found)
        for row, value, is_greedy in zip(batch.rows, values, greedy, strict=True):
            result[row] = (value, is_greedy)
    return result


def mean_log_likelihoods(
    model: LanguageModel, texts: Sequence[RenderedText], *, warn: bool = True
) -> torch.Tensor:
    """Return the mean log-likelihood a token of every text, shape (n,), in nats.

    See `token_log_likelihoods`; a text of one token has NaN.
    """
    found = token_log_likelihoods(model, texts, warn=warn)
    return torch.stack([scores.mean() for scores in found])


@torch.inference_mode()
def continuation_log_likelihoods(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[list[int], list[list[ContinuationScore]]], None] | None = None,
    progress: bool = True,
) -> list[list[ContinuationScore]]:
    """Return how likely every continuation of every context is.

    A context is read once for all its continuations, which go on from its keys and
    values; steering sees the context as the prompt and a continuation as generated.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    requests : sequence of Request
        Contexts of at least one token, continuations of at least one.
    batch_tokens : int, default=2048
        Most tokens in a batch, padding counted.
    on_batch : callable, optional
        Called with the places of the requests that a batch finished, and their scores.
    progress : bool, default=True

    Returns
    -------
    list of list of ContinuationScore
        By request and continuation.
    """
    result: list[list[ContinuationScore]] = [[] for _ in requests]
    lengths, heads = request_sizes(requests)
    batches = list(token_batches(lengths, batch_tokens, head_positions=heads))
    with tqdm(total=len(requests), desc="scoring", delay=1, disable=not progress) as bar:
        for places in batches:
            scores = _score_batch(model, [requests[place] for place in places])
            for place, score in zip(places, scores, strict=True):
                result[place] = score
            if on_batch is not None:
                on_batch(places, scores)
            bar.update(len(places))
    return result


def request_sizes(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    """Return how many tokens each context has, and how many positions reach the output head."""
    heads = [sum(map(len, request.continuations)) for request in requests]
    return [len(request.context) for request in requests], heads


def _score_batch(
    model: LanguageModel, requests: Sequence[Request]
) -> list[list[ContinuationScore]]:
    # What a purely recurrent model has read cannot be gone on from in several ways.
    stateful = getattr(model.model, "_is_stateful", False)
    return (_score_anew if stateful else _score_from_cache)(model, requests)


def _score_anew(model: LanguageModel, requests: Sequence[Request]) -> list[list[ContinuationScore]]:
    scores = []
    for context, continuations in requests:
        found = _read_whole(model, [context + tokens for tokens in continuations])
        answers = [
            (values[-len(tokens) :], greedy[-len(tokens) :])
            for tokens, (values, greedy) in zip(continuations, found, strict=True)
        ]
        scores.append(
            [ContinuationScore(float(v.double().sum()), bool(g.all())) for v, g in answers]
        )
    return scores


def _score_from_cache(
    model: LanguageModel, requests: Sequence[Request]
) -> list[list[ContinuationScore]]:
    # Padding to the left keeps distances between context and continuation as they are.
    lengths = [len(request.context) for request in requests]
    contexts, mask = padded(model, [request.context for request in requests], "left")
    owners = [place for place, request in enumerate(requests) for _ in request.continuations]
    continuations = [tokens for request in requests for tokens in request.continuations]
    longer = [row for row, tokens in enumerate(continuations) if len(tokens) > 1]

    last = torch.full((len(requests),), contexts.shape[1] - 1)
    read, states = _decode(
        model,
        *(torch.arange(len(requests)), last),
        **(_inputs(contexts, mask, lengths) | position_ids(model, mask)),
        use_cache=bool(longer),
    )
    # The output head packs its weights anew whenever it is called, however few positions it
    # is given: those of a batch share the calls.
    in_front_of_head = [states]
    # Of every token: its continuation, the state that predicts it, itself.
    wanted = [(row, owner, continuations[row][0]) for row, owner in enumerate(owners)]
    n_states = len(requests)
    # The newest token is predicted and never read.
    tails = [continuations[row][:-1] for row in longer]
    their_owners = [owners[row] for row in longer]
    cache = read.past_key_values
    for places, inputs in continuation_batches(model, cache, mask, their_owners, tails):
        rows = [longer[place] for place in places]
        new = real_places([len(tails[place]) for place in places])
        _, states = _decode(model, *new, **inputs)
        in_front_of_head.append(states)
        following = [(row, token) for row in rows for token in continuations[row][1:]]
        wanted += [(row, n, token) for n, (row, token) in enumerate(following, n_states)]
        n_states += len(following)

    _, places, tokens = torch.tensor(wanted).T
    values, greedy = _Predicted(model, read, torch.cat(in_front_of_head)).gather(tokens, places)
    totals, all_greedy = [0.0] * len(continuations), [True] * len(continuations)
    found = zip(wanted, values.tolist(), greedy.tolist(), strict=True)
    for (row, _, _), value, is_greedy in found:
        totals[row] += value
        all_greedy[row] = all_greedy[row] and is_greedy

    scores: list[list[ContinuationScore]] = [[] for _ in requests]
    for owner, total, is_greedy in zip(owners, totals, all_greedy, strict=True):
        scores[owner].append(ContinuationScore(total, is_greedy))
    return scores


def _decode(
    model: LanguageModel, rows: torch.Tensor, columns: torch.Tensor, **inputs: Any
) -> tuple[Any, torch.Tensor]:
    """Let the decoder read a batch, steered or not, and the output head nothing yet.

    Parameters
    ----------
    model : LanguageModel
    rows, columns : Tensor of shape (n,)
        The wanted positions.
    **inputs
        Of the model.

    Returns
    -------
    output : ModelOutput
        The decoder's.
    states : Tensor of shape (n, width)
        Of the wanted positions, what the output head would see.
    """
    outputs: list[Any] = []
    nowhere = torch.empty(0, dtype=torch.long)
    decoder = model.model.get_decoder()
    handle = decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with head_sees(model, nowhere, nowhere):
            model.model(**inputs)
    finally:
        handle.remove()
    hidden = outputs[0].last_hidden_state
    return outputs[0], hidden[to_device(rows, hidden.device), to_device(columns, hidden.device)]


class _Predicted:
    """What a model predicts from states in front of its output head.

    What an architecture does behind the head (caps, scales) is its own code: its forward
    pass runs, with a decoder that returns these states.

    Parameters
    ----------
    model : LanguageModel
    output : ModelOutput
        An output of the decoder.
    states : Tensor of shape (n, width)
    """

    def __init__(self, model: LanguageModel, output: Any, states: torch.Tensor) -> None:
        self._model = model
        self._output = output
        self._states = states

    def logits(self) -> Iterator[torch.Tensor]:
        """Yield the logits of at most 512 states at a time."""
        decoder = self._model.model.get_decoder()
        for part in self._states.split(HEAD_POSITIONS):
            output = copy.copy(self._output)
            output["last_hidden_state"] = part[None]
            ids = torch.zeros((1, len(part)), dtype=torch.long, device=part.device)
            with replaced_forward(decoder, lambda *_args, output=output, **_options: output):
                logits = self._model.model(input_ids=ids, use_cache=False).logits[0]
            yield logits

    def gather(
        self, tokens: torch.Tensor, places: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's log-probability and whether it is the likeliest.

        ``places`` says which state predicts a token; default: one each.
        """
        places = torch.arange(len(tokens)) if places is None else places
        order, found = [], []
        for n, logits in enumerate(self.logits()):
            wanted = (places // HEAD_POSITIONS == n).nonzero().squeeze(1)
            found.append(_gather(logits, tokens[wanted], places[wanted] % HEAD_POSITIONS))
            order.append(wanted)
        back = torch.cat(order).argsort()
        # Fetched once: the CPU waits for a GPU wherever it is asked for numbers.
        values, greedy = (torch.cat(parts).cpu()[back] for parts in zip(*found, strict=True))
        return values, greedy


@contextmanager
def head_sees(model: LanguageModel, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Let only some positions of the batch reach the output head, as one row of them."""

    def choose(_head: torch.nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        hidden = args[0]
        rows_there, columns_there = (to_device(x, hidden.device) for x in (rows, columns))
        return (hidden[rows_there, columns_there][None],)

    head = cast(torch.nn.Module, model.model.get_output_embeddings())
    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _gather(
    logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's log-probability and whether it is the likeliest.

    ``rows`` says which row of the logits a token belongs to; default: one each.
    """
    normalisers, best = [], []
    for part in logits.split(_FLOAT32_ROWS):
        normalisers.append(part.float().logsumexp(-1))
        best.append(part.argmax(-1))
    normaliser, likeliest = torch.cat(normalisers), torch.cat(best)
    index = torch.arange(len(tokens)) if rows is None else rows
    tokens, index = (to_device(x, logits.device) for x in (tokens, index))
    values = logits[index, tokens].float() - normaliser[index]
    return values, likeliest[index] == tokens


def _inputs(
    batch: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int]
) -> dict[str, torch.Tensor]:
    if min(lengths) == batch.shape[1]:
        return {"input_ids": batch}  # without a mask the fastest attention kernels serve
    return {"input_ids": batch, "attention_mask": mask}
