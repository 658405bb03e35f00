"""Questions and answers: the form of a prompt, and when two answers are the same."""

from __future__ import annotations

import math
import re
import unicodedata

__all__ = ["ANSWER_SIGN", "question_prompt", "same_answer"]

ANSWER_SIGN = "The answer is"


def question_prompt(question: str, context: str = "") -> str:
    """Return what stands before an answer, ending in "Answer:"."""
    return f"{context}Question: {question}\nAnswer:"


def same_answer(found: str, right: str) -> bool:
    """Return whether two answers are the same number, or the same text but for its form.

    Numbers may differ in thousands separators, a currency or percent sign, trailing
    zeros, or be a fraction; texts in case, spaces and LaTeX's dollar signs.
    """
    numbers = [_number(text) for text in (found, right)]
    if numbers[1] is not None:
        return numbers[0] is not None and abs(numbers[0] - numbers[1]) <= 1e-6 * max(
            1.0, abs(numbers[1])
        )
    return _normal(found) == _normal(right)


def _number(text: str) -> float | None:
    plain = re.sub(r"\\?[$€£%]|[,\s]", "", text).removesuffix(".")
    match = re.fullmatch(r"(-?)\\d?frac\{(-?\d+)\}\{(\d+)\}", plain)
    if match:
        plain = f"{match[1]}{match[2]}/{match[3]}"
    top, slash, bottom = plain.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(plain)
    except (ValueError, ZeroDivisionError):
        return None
    # "nan" and "infinity" are words.
    return value if math.isfinite(value) else None


def _normal(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold().strip(" $.\n")
    return "".join(plain.split())
