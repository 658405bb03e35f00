"""Data: labelled examples, plain text, and what effects are measured with."""

from expertsteer.data.effect import EffectWords
from expertsteer.data.examples import SPLITS, LabelledExamples, RenderedText, render
from expertsteer.data.formats import KINDS, load_examples
from expertsteer.data.plain import load_plain_lines, load_plain_text, sentence_beginnings
from expertsteer.data.prompts import load_prompts
from expertsteer.data.shipped import shipped_file

__all__ = [
    "KINDS",
    "SPLITS",
    "EffectWords",
    "LabelledExamples",
    "RenderedText",
    "load_examples",
    "load_plain_lines",
    "load_plain_text",
    "load_prompts",
    "render",
    "sentence_beginnings",
    "shipped_file",
]
