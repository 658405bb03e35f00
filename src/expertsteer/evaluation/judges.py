"""Judges of generated text that know nothing of the vectors: a lexicon, or a classifier."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

from expertsteer.data import LabelledExamples, load_examples, shipped_file
from expertsteer.data.benchmarks import BENCHMARKS
from expertsteer.data.readers import read_rows
from expertsteer.errors import DataError, ModelError, ParameterError
from expertsteer.models import SentenceEncoder, load_sentence_encoder
from expertsteer.models.sentence_encoder import MINILM
from expertsteer.pack import SteeringPack

__all__ = ["ClassifierJudge", "Judge", "VaderJudge", "load_judge"]

_FOLDS = 5


class Judge(Protocol):
    """Scores texts."""

    @property
    def name(self) -> str:
        """Of the scores in a row."""
        ...

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return a score a text; higher is more of the behaviour."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return what decides the scores, as plain JSON types."""
        ...

    def require_independent(self, pack: SteeringPack) -> None:
        """Raise DataError if a pack was made from what this judge knows."""
        ...


class VaderJudge:
    """Sentiment by a lexicon and rules, from -1 (negative) to 1 (positive).

    Raises
    ------
    ModelError
        If the package vaderSentiment (extra ``judge``) is missing.

    Notes
    -----
    The compound score of VADER (Hutto and Gilbert 2014, ICWSM). English.
    """

    name = "vader"

    def __init__(self) -> None:
        if importlib.util.find_spec("vaderSentiment") is None:
            raise ModelError(
                "Got the judge 'vader', but expected its package vaderSentiment to be installed. "
                'Install it with: pip install "expertsteer[judge]"'
            )
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyser = SentimentIntensityAnalyzer()

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the compound score of every text."""
        return [float(self._analyser.polarity_scores(text)["compound"]) for text in texts]

    def summary(self) -> dict[str, Any]:
        """Return the judge's name and version."""
        return {"name": self.name, "version": version("vaderSentiment")}

    def require_independent(self, pack: SteeringPack) -> None:
        """Do nothing: a lexicon was trained on no pack's data."""


@dataclass(frozen=True)
class ClassifierJudge:
    """Probability that a text shows a behaviour, learned from labelled texts.

    A logistic regression over sentence embeddings; `fit` makes one.

    Attributes
    ----------
    examples : LabelledExamples
        What it was trained on (train and validation) and measured on (test).
    encoder : SentenceEncoder
    classifier : LogisticRegression
    accuracy : float
        On the test split.
    majority : float
        Share of the larger class in the test split: the accuracy of always saying it.
    """

    examples: LabelledExamples
    encoder: SentenceEncoder
    classifier: LogisticRegression
    accuracy: float
    majority: float
    name = "classifier"

    @classmethod
    def fit(
        cls, examples: LabelledExamples, encoder: SentenceEncoder, *, seed: int = 0
    ) -> ClassifierJudge:
        """Train a judge.

        Parameters
        ----------
        examples : LabelledExamples
            Other texts than the pack was made from. Their answers are read, prompts are
            not: a continuation is judged without its prompt as well.
        encoder : SentenceEncoder
        seed : int, default=0
            Of the folds.

        Returns
        -------
        ClassifierJudge
            Its regularisation is the one of seven, from 0.001 to 1,000, that predicts
            best in 5-fold cross-validation; rows of a group share a fold.

        Raises
        ------
        DataError
            If a class is missing or small, or a text has both labels.
        """
        examples.require_both_classes("train")
        examples.require_both_classes("test", min_rows=1)
        _require_one_label(examples)
        known, held_out = examples.for_fitting(), examples.split("test")
        n_groups = len(set(known.groups))
        if n_groups < _FOLDS:
            raise DataError(
                f"Got {n_groups} groups in the train and validation splits of {examples.source}, "
                f"but expected at least {_FOLDS} to train a judge on."
            )
        search = GridSearchCV(
            LogisticRegression(max_iter=1000),
            {"C": np.logspace(-3, 3, 7).tolist()},
            scoring="neg_log_loss",
            cv=StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed),
        )
        search.fit(encoder.encode(known.answers), known.labels, groups=known.groups)
        classifier = search.best_estimator_
        accuracy = classifier.score(encoder.encode(held_out.answers), held_out.labels)
        positive = float((held_out.labels > 0).mean())
        return cls(examples, encoder, classifier, float(accuracy), max(positive, 1 - positive))

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the probability of the positive class for every text."""
        if not texts:
            return []
        probabilities = self.classifier.predict_proba(self.encoder.encode(texts))
        positive = list(self.classifier.classes_).index(1)
        return [float(row[positive]) for row in probabilities]

    def summary(self) -> dict[str, Any]:
        """Return data, encoder, regularisation and held-out accuracy."""
        return {
            "name": self.name,
            "data": self.examples.summary(),
            "n_held_out": self.examples.splits.count("test"),
            "encoder": self.encoder.name,
            "C": float(self.classifier.C),
            "accuracy": self.accuracy,
            "majority": self.majority,
        }

    def require_independent(self, pack: SteeringPack) -> None:
        """Raise if the judge was trained on what a pack was made from.

        The fingerprint of every data set in the pack's provenance is compared with the
        judge's, and the name of those that are no files. Where a file of the recorded
        name is found (as named, beside the judge's file, or among those that come with
        this package), its texts are compared as well; where there is none, a warning says
        so.

        Parameters
        ----------
        pack : SteeringPack

        Raises
        ------
        DataError
            If the data are the same, or a text of the judge is in the pack's.
        """
        own = set(self.examples.answers)
        # A pack records what it was fitted on, which the test split is no part of.
        fingerprints = {self.examples.fingerprint, self.examples.for_fitting().fingerprint}
        for data in _recorded(pack.provenance):
            origin = str(data.get("source"))
            found = _located(origin, self.examples.source)
            same_name = not found and origin == self.examples.summary()["source"]
            if data.get("fingerprint") in fingerprints or same_name:
                raise DataError(
                    f"Got a judge trained on {self.examples.source}, but the pack was made from "
                    "the same data. Train the judge on others."
                )
            if not found:
                warnings.warn(
                    f"The pack was made from {origin}, which is not here: its texts could not be "
                    "compared with the judge's. Only their fingerprints differ.",
                    stacklevel=2,
                )
            for path in found:
                shared = own & _strings(path)
                if shared:
                    raise DataError(
                        f"Got a judge trained on {self.examples.source}, of which {len(shared)} "
                        f"texts are in {path.name}, a name the pack records as its data, such as "
                        f"{min(shared)[:60]!r}. Train the judge on other texts."
                    )


def load_judge(
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    positive: str | None = None,
    negative: str | None = None,
    kind: str = "auto",
    encoder: str | Path | None = None,
    seed: int = 0,
) -> Judge:
    """Load a judge by its name, or train one.

    Parameters
    ----------
    name : str
        "vader", or labelled texts: a file, a benchmark or a hub data set, see
        `load_examples`.
    columns, roles, positive, negative, kind
        As in `load_examples`.
    encoder : str or Path, optional
        See `load_sentence_encoder`; default: all-minilm-l6-v2.
    seed : int, default=0
        Of splits and folds.

    Returns
    -------
    VaderJudge or ClassifierJudge

    Raises
    ------
    ParameterError
        If there is no such judge and no such file.
    DataError
        If the file is unusable.
    ModelError
        If a package is missing or the encoder cannot be loaded.
    """
    if name == VaderJudge.name:
        return VaderJudge()
    if "/" not in name and name not in BENCHMARKS and not Path(name).exists():
        raise ParameterError(
            f"Got the judge {name!r}, but expected {VaderJudge.name}, or labelled texts: a file, a "
            "benchmark or a hub data set (owner/name)."
        )
    examples = load_examples(
        name,
        kind=kind,
        columns=columns,
        roles=roles,
        positive=positive,
        negative=negative,
        seed=seed,
    )
    return ClassifierJudge.fit(examples, load_sentence_encoder(encoder or MINILM), seed=seed)


def _require_one_label(examples: LabelledExamples) -> None:
    labels = dict(zip(examples.answers, examples.labels, strict=True))
    for answer, label in zip(examples.answers, examples.labels, strict=True):
        if labels[answer] != label:
            raise DataError(
                f"Got the text {answer[:60]!r} of {examples.source} with both labels, but expected "
                "texts that show the behaviour without a prompt before them."
            )


def _recorded(provenance: Any) -> Iterator[dict[str, Any]]:
    """Yield what a provenance says of labelled data, at any depth: sums, transfers, calibration."""
    if isinstance(provenance, list):
        for item in provenance:
            yield from _recorded(item)
    elif isinstance(provenance, dict):
        for name, value in provenance.items():
            if name == "data" and isinstance(value, dict):
                yield value
            else:
                yield from _recorded(value)


def _located(origin: str, beside: str) -> list[Path]:
    name = Path(origin).name
    places = {Path(origin), Path(beside).parent / name, shipped_file(name)}
    return sorted(place for place in places if place.is_file())


def _strings(path: Path) -> set[str]:
    return {
        text
        for _, row in read_rows(path)
        for value in row.values()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    }
