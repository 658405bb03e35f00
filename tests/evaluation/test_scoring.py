"""The output head's work in parts: the values of one pass, and never more positions at a time."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from expertsteer.data import RenderedText
from expertsteer.errors import DataError
from expertsteer.evaluation import scoring
from expertsteer.evaluation.scoring import (
    Request,
    continuation_log_likelihoods,
    encode_request,
    token_divergences,
    token_log_likelihoods,
)
from expertsteer.models import LanguageModel, batches
from expertsteer.models.batches import token_batches
from expertsteer.steering import Steering
from helpers import (
    CONTEXT,
    FAMILIES,
    RECURRENT,
    random_ids,
    random_vector,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)

PARTS_OF = 8
# What some architectures do behind the head, which a plain matrix product would miss.
BEHIND_THE_HEAD = {
    "gemma2": {"final_logit_softcapping": 1.5},
    "gemma3_text": {"final_logit_softcapping": 1.5},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


def words(n, seed=0):
    (ids,) = random_ids(1, n, seed).tolist()
    return " ".join(tiny_tokenizer().convert_ids_to_tokens(ids))


TEXTS = [RenderedText(text, 0, False) for text in (words(CONTEXT - 1), words(5, 1), words(30, 2))]


def family_model(family):
    """Return a tiny model that does much behind its head, where its family does anything."""
    changed = BEHIND_THE_HEAD.get(family)
    if changed is None:
        return tiny_language_model(family)
    model = copy.deepcopy(tiny_model(family))
    for name, value in changed.items():
        assert hasattr(model.config, name)
        setattr(model.config, name, value)
        if hasattr(model, name):  # read when the model was made
            setattr(model, name, value)
    return LanguageModel(model, tiny_tokenizer(), f"tiny-{family}")


@contextmanager
def watched(model):
    """Record how many positions leave the head, and how many tokens its decoder's blocks read."""
    heads, read = [], []

    def leaves(_head, _args, output):
        heads.append(output.shape[:-1].numel())

    def begins(_embeddings, args, _output):
        read.append(args[0].numel())

    handles = [
        model.model.get_output_embeddings().register_forward_hook(leaves),
        model.model.get_input_embeddings().register_forward_hook(begins),
    ]
    try:
        yield heads, read
    finally:
        for handle in handles:
            handle.remove()


def by_hand(model, text, steering=None):
    ids = model.tokenizer(text.text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        if steering is None:
            scores = model.model(ids).logits[0, :-1].log_softmax(-1)
        else:
            with steering:
                scores = model.model(ids).logits[0, :-1].log_softmax(-1)
    return scores, ids[0, 1:]


def test_an_answer_that_no_context_holds_is_refused():
    model = tiny_language_model("llama")
    with pytest.raises(DataError, match=f"answer of {CONTEXT + 1} tokens, .* holds {CONTEXT}"):
        encode_request(model, "w1 w2", [" w3" * (CONTEXT + 1)])
    request, is_cut = encode_request(model, "w1 w2", [" w3" * CONTEXT])
    assert (len(request.context), is_cut) == (1, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_have_the_values_of_one_pass(family, monkeypatch):
    model = family_model(family)
    steering = Steering(model.model, {1: random_vector()})
    for module in (scoring, batches):
        monkeypatch.setattr(module, "HEAD_POSITIONS", PARTS_OF)
    with watched(model) as (heads, read):
        likelihoods = token_log_likelihoods(model, TEXTS)
    assert max(heads) == PARTS_OF
    assert sum(heads) == sum(len(values) for values in likelihoods)
    assert sum(read) == sum(heads)  # every text once, and nothing again for the parts
    with watched(model) as (heads, _):
        damages = token_divergences(model, TEXTS, steering)
    assert max(heads) == PARTS_OF
    for text, values, damage in zip(TEXTS, likelihoods, damages, strict=True):
        plain, following = by_hand(model, text)
        steered, _ = by_hand(model, text, steering)
        close = {"atol": 1e-4, "rtol": 1e-4}
        expected = plain.gather(1, following[:, None])[:, 0]
        torch.testing.assert_close(values, expected, **close)
        torch.testing.assert_close(damage.log_likelihood, expected, **close)
        chosen = steered.gather(1, following[:, None])[:, 0]
        torch.testing.assert_close(damage.steered_log_likelihood, chosen, **close)
        divergence = (plain.exp() * (plain - steered)).sum(-1)
        torch.testing.assert_close(damage.divergence, divergence, **close)
        assert float(damage.divergence.max()) > 1e-3


def test_rows_of_similar_length_are_read_together():
    lengths = [9, 2, 3, 8, 2, 3, 2]
    # A quarter of 16 tokens is worth a batch; a shorter row then begins another one.
    assert list(token_batches(lengths, 16)) == [[0], [3], [2, 5], [1, 4, 6]]
    assert list(token_batches(lengths, 16, mix_lengths=True)) == [
        [0],
        [3, 2],
        [5, 1, 4, 6],
    ]
    assert list(token_batches([2] * 9, 16)) == [list(range(8)), [8]]
    assert list(token_batches([2] * 3, 16, head_positions=[300] * 3)) == [[0], [1], [2]]


def test_continuations_of_many_lengths_are_read_from_one_context():
    model = family_model("llama")
    ids = random_ids(1, 40, 3)[0].tolist()
    context, tokens = tuple(ids[:5]), tuple(ids[5:40])
    lengths = (1, 2, 3, 5, 8, 13, 21, 34)
    requests = [Request(context, tuple(tokens[:n] for n in lengths)) for _ in range(20)]
    with watched(model) as (heads, read):
        scores = continuation_log_likelihoods(model, requests, progress=False)
    # Padded to the longest, the continuations alone would be these.
    assert sum(read) < 20 * (5 + 7 * 33)
    alone = continuation_log_likelihoods(model, requests[:1], progress=False)[0]
    for found in scores:
        for one, other in zip(found, alone, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
    assert len(heads) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_long_continuations_are_scored_in_parts(family, monkeypatch):
    model = family_model(family)
    ids = random_ids(1, 40, 3)[0].tolist()
    request = Request(tuple(ids[:10]), (tuple(ids[10:40]), tuple(ids[20:40])))
    for module in (scoring, batches):
        monkeypatch.setattr(module, "HEAD_POSITIONS", PARTS_OF)
    with watched(model) as (heads, read):
        (scores,) = continuation_log_likelihoods(model, [request], progress=False)
    assert max(heads) == PARTS_OF
    if family not in RECURRENT:
        # The context once; then either continuation, unpadded and without its newest token.
        assert sum(read) in (10 + 29 + 19, 39 + 29)
    for tokens, score in zip(request.continuations, scores, strict=True):
        with torch.inference_mode():
            logits = model.model(torch.tensor([[*request.context, *tokens]])).logits[0]
        rows = logits.log_softmax(-1)[len(request.context) - 1 : -1]
        expected = float(rows.gather(1, torch.tensor(tokens)[:, None]).sum())
        assert score.log_likelihood == pytest.approx(expected, abs=1e-3)


def test_contexts_and_continuations_share_a_call_of_the_head():
    model = tiny_language_model("llama")
    requests = [Request((7, 8, 9), ((11,), (12, 13, 14))), Request((9, 8, 7), ((11, 12),))]
    with watched(model) as (heads, read):
        continuation_log_likelihoods(model, requests, progress=False)
    assert [n for n in heads if n] == [5]
    assert len(read) == 2


def test_512_positions_at_most_leave_the_head():
    config = copy.deepcopy(tiny_model("llama").config)
    config.max_position_embeddings = 2048
    torch.manual_seed(0)
    model = LanguageModel(type(tiny_model("llama"))(config).eval(), tiny_tokenizer(), "long")
    text = RenderedText(words(1300), 0, False)
    with watched(model) as (heads, read):
        (values,) = token_log_likelihoods(model, [text])
    # Nothing while the decoder reads.
    assert (heads, read) == ([0, 512, 512, 276], [1300])
    scores, following = by_hand(model, text)
    expected = scores.gather(1, following[:, None])[:, 0]
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)


def test_a_decoder_is_left_as_it_was(monkeypatch):
    model = tiny_language_model("llama")
    decoder = model.model.get_decoder()
    for module in (scoring, batches):
        monkeypatch.setattr(module, "HEAD_POSITIONS", PARTS_OF)
    before = token_log_likelihoods(model, TEXTS)
    assert "forward" not in vars(decoder)
    # As accelerate does it.
    monkeypatch.setattr(decoder, "forward", decoder.forward, raising=False)
    own = decoder.forward
    for found, expected in zip(token_log_likelihoods(model, TEXTS), before, strict=True):
        assert torch.equal(found, expected)
    assert decoder.forward is own
    assert not decoder._forward_hooks


def test_texts_that_do_not_fit_are_counted():
    model = tiny_language_model("llama")
    texts = [*TEXTS, RenderedText(words(CONTEXT + 5), 0, False)]
    with pytest.warns(UserWarning, match="1 of 4 texts are longer than the context of tiny-llama"):
        damages = token_divergences(model, texts, None)
    assert [damage.is_cut for damage in damages] == [False, False, False, True]
    assert len(damages[-1].divergence) == CONTEXT - 1
    with pytest.warns(UserWarning, match="1 of 4 texts"):
        token_log_likelihoods(model, texts)
