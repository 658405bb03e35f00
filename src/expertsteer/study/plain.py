"""The plain text of a study: for damage budgets, for reported damage, for alignments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from expertsteer.data import load_plain_text, sentence_beginnings
from expertsteer.study.settings import StudySettings

__all__ = ["PlainText"]


@dataclass(frozen=True)
class PlainText:
    """The study's plain text.

    Attributes
    ----------
    budget, test : list of str
        Sentences that strengths are set by, and that damage is reported on.
    beginnings : list of str
        What alignments without labels are fitted on.
    """

    budget: list[str]
    test: list[str]
    beginnings: list[str]

    @classmethod
    def load(cls, study: StudySettings) -> PlainText:
        """Load the study's plain text."""
        sentences = load_plain_text(study.plain_text)
        other = load_plain_text(study.plain_text_test) if study.plain_text_test else sentences[::-1]
        wanted = [
            max([arm.n_beginnings or study.n_beginnings for arm in study.methods]),
            study.n_beginnings,
        ]
        return cls(
            _whole(sentences, study.n_plain),
            _whole(other, study.n_plain),
            sentence_beginnings(sentences[study.n_plain :], max(wanted)),
        )

    def fingerprint(self, with_beginnings: bool) -> str:
        """Return a hash of what a cell reads of it; 16 hexadecimal digits."""
        read = [*self.budget, "", *self.test, *(self.beginnings if with_beginnings else ())]
        return hashlib.sha256("\n".join(read).encode()).hexdigest()[:16]


def _whole(sentences: list[str], n: int) -> list[str]:
    return [sentence for sentence in sentences if len(sentence.split()) > 5][:n]
