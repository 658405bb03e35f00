from __future__ import annotations

import json

import pytest
import yaml

from expertsteer.data import EffectWords, shipped_file
from expertsteer.errors import DataError

WORDS = {
    "prompts": ["The film was"],
    "positive_words": ["good", "😀"],
    "negative_words": ["bad"],
    "plain_sentences": ["Water boils."],
    "generation_prompts": ["Today"],
}


@pytest.fixture
def write(tmp_path):
    def write_words(values, name: str = "words.json"):
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return write_words


@pytest.mark.parametrize("indent", [None, 1, "\t"])
def test_json(write, indent):
    assert EffectWords.load(write(json.dumps(WORDS, indent=indent))) == EffectWords(**WORDS)


@pytest.mark.parametrize("name", ["words.yaml", "words.yml"])
def test_yaml(write, name):
    assert EffectWords.load(write(yaml.safe_dump(WORDS), name)) == EffectWords(**WORDS)


def test_generation_prompts_may_be_left_out(write):
    values = {name: items for name, items in WORDS.items() if name != "generation_prompts"}
    assert EffectWords.load(write(values)).generation_prompts == []


@pytest.mark.parametrize("name", ["prompts", "positive_words", "negative_words", "plain_sentences"])
def test_a_list_that_is_missing_is_named(write, name):
    values = {key: items for key, items in WORDS.items() if key != name}
    with pytest.raises(DataError, match=f"with {name}=None, but expected a list of texts"):
        EffectWords.load(write(values))


@pytest.mark.parametrize("name", list(WORDS))
@pytest.mark.parametrize("items", [[], "word", [1], [" "], [True], None])
def test_a_list_that_holds_no_texts_is_named(write, name, items):
    with pytest.raises(DataError, match=f"with {name}=.*but expected a list of texts"):
        EffectWords.load(write(WORDS | {name: items}))


@pytest.mark.parametrize("values", [[1], "3", WORDS | {"posiive_words": ["good"]}])
def test_anything_but_the_lists_is_refused(write, values):
    with pytest.raises(DataError, match="expected the lists prompts, positive_words"):
        EffectWords.load(write(values))


def test_a_word_on_both_sides_is_refused(write):
    with pytest.raises(DataError, match="'good' as positive and negative word"):
        EffectWords.load(write(WORDS | {"negative_words": ["bad", "good"]}))


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"prompts": ['), ("a.yaml", "a: [b\nc: d")])
def test_a_file_that_cannot_be_parsed_is_refused_in_one_line(write, name, text):
    with pytest.raises(DataError, match="neither JSON nor YAML") as caught:
        EffectWords.load(write(text, name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        EffectWords.load(tmp_path / "none.json")


def test_the_shipped_words_load():
    words = EffectWords.load(shipped_file("sentiment_effect.json"))
    assert words.generation_prompts
    assert len(words.prompts) >= 8
