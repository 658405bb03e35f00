"""The plain text of a study: for damage budgets, for reported damage, for alignments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from expertsteer.data import draw_sentences, load_plain_text, sentence_beginnings
from expertsteer.study.settings import PlainSource, StudySettings

__all__ = ["PlainText"]


@dataclass(frozen=True)
class PlainText:
    """The study's plain text.

    Attributes
    ----------
    budget, test : list of str
        Sentences that strengths are set by, and that damage is reported on.
    beginnings : dict of PlainSource to list of str
        What alignments without labels are fitted on: by where they come from, the most that
        an arm takes.
    """

    budget: list[str]
    test: list[str]
    beginnings: dict[PlainSource, list[str]]

    @classmethod
    def load(cls, study: StudySettings) -> PlainText:
        """Load the study's plain text and divide it.

        Raises
        ------
        DataError
            If there are too few sentences.
        """
        sentences = load_plain_text(study.plain_text)
        if study.plain_text_test:
            budget = draw_sentences(sentences, study.n_plain)
            test = draw_sentences(load_plain_text(study.plain_text_test), study.n_plain)
        else:
            both = draw_sentences(sentences, 2 * study.n_plain)
            budget, test = both[::2], both[1::2]
        # What damage is reported on is fitted on by no alignment.
        taken = {*budget, *test}
        wanted: dict[PlainSource, int] = {}
        for arm in study.methods:
            if arm.uses_plain_text:
                n = arm.n_beginnings or study.n_beginnings
                wanted[arm.plain_source] = max(n, wanted.get(arm.plain_source, 0))
        beginnings = {}
        for source, n in wanted.items():
            text = load_plain_text(source.file) if source.file else sentences
            rest = [sentence for sentence in text if sentence not in taken]
            beginnings[source] = sentence_beginnings(rest, n, n_sentences=source.n_sentences)
        return cls(budget, test, beginnings)

    def fingerprint(self, n_beginnings: int, source: PlainSource) -> str:
        """Return a hash of what a cell reads of it; 16 hexadecimal digits."""
        beginnings = self.beginnings[source][:n_beginnings] if n_beginnings else []
        read = [*self.budget, "", *self.test, *beginnings]
        return hashlib.sha256("\n".join(read).encode()).hexdigest()[:16]
