from __future__ import annotations

from collections import Counter

import pytest

from expertsteer.data import (
    draw_sentences,
    load_plain_lines,
    load_plain_text,
    sentence_beginnings,
    split_sentences,
)
from expertsteer.errors import DataError, ParameterError

WIKI = """
 = Lobster =

 The lobster , H. americanus , is <unk> . It is 4 @.@ 5 cm long ! Why ? Nobody knows .

 = = Diet = =

 It eats fish .
"""


@pytest.fixture
def write(tmp_path):
    def write_text(text: str):
        path = tmp_path / "plain.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def test_wiki_text_loses_headings_and_is_split_into_sentences(write):
    assert load_plain_text(write(WIKI)) == [
        "The lobster , H. americanus , is <unk> .",
        "It is 4 @.@ 5 cm long !",
        "Why ?",
        "Nobody knows .",
        "It eats fish .",
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("(So it was.) 3 came.", ["(So it was.)", "3 came."]),
        ('One. "Two," he said.', ["One.", '"Two," he said.']),
        ("It cost 3.50 at most. yes", ["It cost 3.50 at most. yes"]),
        ("# Title\nA line\nNo full stop", ["A line", "No full stop"]),
    ],
)
def test_sentences(write, text, sentences):
    assert load_plain_text(write(text)) == sentences


@pytest.mark.parametrize(
    ("suffix", "table"),
    [
        (".jsonl", '{"text": "One. Two.", "label": 1}\n{"text": "# Three\\nFour", "label": 0}\n'),
        (".json", '[{"text": "One. Two."}, {"text": "Four"}]'),
        (".csv", 'label,text\nhappy,One. Two.\nsad,"= x =\nFour"\n'),
    ],
)
def test_of_rows_the_text_alone_is_read(tmp_path, suffix, table):
    path = tmp_path / f"rows{suffix}"
    path.write_text(table, encoding="utf-8")
    assert load_plain_text(path) == ["One.", "Two.", "Four"]


def test_rows_without_a_text_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One."}\n{"question": "Two?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:2: got text=None, but expected some text"):
        load_plain_text(path)


def test_lines_are_kept_whole(write):
    assert load_plain_lines(write("One. Two.\n\n  = x =\n")) == ["One. Two.", "= x ="]


@pytest.mark.parametrize("text", ["", "\n \n"])
@pytest.mark.parametrize("load", [load_plain_text, load_plain_lines])
def test_an_empty_file_is_refused(write, load, text):
    with pytest.raises(DataError, match="which is empty"):
        load(write(text))


def test_a_file_of_headings_is_refused(write):
    with pytest.raises(DataError, match="headings only"):
        load_plain_text(write(" = A = \n # B\n"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_plain_text(tmp_path / "none.txt")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_plain_text(path)


def test_the_shipped_text_yields_what_an_alignment_is_fitted_on():
    sentences = load_plain_text()
    assert len(sentences) >= 1200
    assert len(set(sentences)) == len(sentences)
    assert len(set(sentence_beginnings(sentences, 1500))) == 1500


SENTENCES = [" ".join(f"s{n}w{word}" for word in range(12)) for n in range(10)]


def test_beginnings_are_beginnings_of_the_lengths_asked_for():
    for text in sentence_beginnings(SENTENCES, 50, min_words=4, max_words=9):
        assert any(sentence.startswith(text + " ") for sentence in SENTENCES)
        assert 4 <= len(text.split()) <= 9


def test_beginnings_use_every_sentence_equally_often():
    counts = Counter(text.split()[0] for text in sentence_beginnings(SENTENCES, 35))
    assert len(counts) == 10
    assert set(counts.values()) == {3, 4}


def test_beginnings_come_from_as_many_sentences_as_asked_for():
    found = sentence_beginnings(SENTENCES, 30, n_sentences=3)
    assert len(set(found)) == 30
    assert len({text.split()[0] for text in found}) == 3
    # Of one sentence, every beginning but the longest is the beginning of a longer one.
    for text in found:
        assert sum(text.split()[0] == other.split()[0] for other in found) > 5
    with pytest.raises(ParameterError, match="n_sentences=0"):
        sentence_beginnings(SENTENCES, 30, n_sentences=0)


def test_beginnings_are_cut_after_any_word():
    sentences = [" ".join(f"s{n}w{word}" for word in range(12)) for n in range(3000)]
    counts = Counter(len(text.split()) for text in sentence_beginnings(sentences, 3000))
    assert set(counts) == set(range(3, 13))
    # Uniform over ten lengths: 300 each, give or take five standard deviations of 16.4.
    assert all(abs(count - 300) < 82 for count in counts.values())


def test_beginnings_depend_on_the_seed_alone():
    first = sentence_beginnings(SENTENCES, 30)
    assert sentence_beginnings(SENTENCES, 30) == first
    assert sentence_beginnings(SENTENCES, 30, seed=1) != first


def test_beginnings_are_distinct_and_all_can_be_had():
    # 10 lengths (3 to 12 words) of each of 10 sentences, of which two are the same.
    sentences = [*SENTENCES[:9], SENTENCES[0]]
    assert len(set(sentence_beginnings(sentences, 90))) == 90
    with pytest.raises(DataError, match=r"10 sentences, which yields 90 beginnings, .* 91\."):
        sentence_beginnings(sentences, 91)


@pytest.mark.parametrize("sentences", [[], ["too short"]])
def test_a_text_without_beginnings_is_refused(sentences):
    with pytest.raises(DataError, match="yields 0 beginnings"):
        sentence_beginnings(sentences, 1)


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"n": 1, "min_words": 0}, {"n": 1, "min_words": 5, "max_words": 4}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ParameterError, match="min_words"):
        sentence_beginnings(SENTENCES, **settings)


def test_sentences_for_budgets_are_never_those_for_reports():
    sentences = [f"This is the sentence with number {n} of all." for n in range(41)]
    sentences += ["Too short.", sentences[0]]
    for n_budget in (3, 12, 100):
        for n_test in (1, 20, 100):
            budget = split_sentences(sentences, n_budget)[0]
            test = split_sentences(sentences, n_test)[1]
            assert not set(budget) & set(test)
            assert (len(budget), len(test)) == (min(n_budget, 21), min(n_test, 20))
    assert "Too short." not in draw_sentences(sentences, 41)
    with pytest.raises(
        DataError, match=r"with 41 sentences of more than 5 words, but expected 42 .* n_plain"
    ):
        draw_sentences(sentences, 42)
    with pytest.raises(
        DataError,
        match=r"with 1 sentences of more than 5 words, but expected 2 .* a longer file\.$",
    ):
        split_sentences(sentences[:1], 5)
