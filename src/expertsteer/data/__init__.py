"""Data: labelled examples, plain text, and what effects are measured with."""

from expertsteer.data.benchmarks import BENCHMARKS, Benchmark, HubSource
from expertsteer.data.effect import EffectWords
from expertsteer.data.examples import LabelledExamples, RenderedText, render
from expertsteer.data.formats import load_examples
from expertsteer.data.kinds import KINDS
from expertsteer.data.plain import (
    draw_sentences,
    load_plain_lines,
    load_plain_text,
    sentence_beginnings,
    split_sentences,
)
from expertsteer.data.prompts import load_prompts
from expertsteer.data.shipped import shipped_file
from expertsteer.data.splits import SPLITS

__all__ = [
    "BENCHMARKS",
    "KINDS",
    "SPLITS",
    "Benchmark",
    "EffectWords",
    "HubSource",
    "LabelledExamples",
    "RenderedText",
    "draw_sentences",
    "load_examples",
    "load_plain_lines",
    "load_plain_text",
    "load_prompts",
    "render",
    "sentence_beginnings",
    "shipped_file",
    "split_sentences",
]
