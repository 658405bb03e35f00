"""Texts of mixed length, the same in every run."""

from __future__ import annotations

import random

from expertsteer.data import load_plain_text

WORDS = (4, 64)


def mixed_texts(n: int, seed: int = 0) -> list[str]:
    """Return distinct pieces of the text that comes with the package.

    Their lengths are log-uniform from 4 to 64 words, as in sets of sentences and questions:
    many short ones and a few long ones, in random order.
    """
    rng = random.Random(seed)
    words = " ".join(load_plain_text()).split()
    low, high = WORDS
    found: dict[str, None] = {}
    while len(found) < n:
        length = round(low * (high / low) ** rng.random())
        begin = rng.randrange(len(words) - length)
        found.setdefault(" ".join(words[begin : begin + length]))
    return list(found)
