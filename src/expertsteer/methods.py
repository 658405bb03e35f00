"""Every way to get vectors for the same layers: ExpertSteer, and what it has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from expertsteer.alignment import Aligner, Alignment
from expertsteer.data import LabelledExamples
from expertsteer.directions import (
    DirectionFinder,
    LogisticProbe,
    MeanDifference,
    PrincipalComponent,
    RecursiveFeatureMachine,
)
from expertsteer.errors import ParameterError
from expertsteer.pipeline import ExpertSteer, fit_directions
from expertsteer.states import States

__all__ = ["METHODS", "Material", "Method", "Vectors", "method_vectors", "shuffled_labels"]

Vectors = dict[int, torch.Tensor]


@dataclass(frozen=True)
class Material:
    """What methods make vectors from.

    Attributes
    ----------
    examples : LabelledExamples
        Directions come from the train split, bandwidths from the validation split.
    expert_states, target_states : States
        Of both models on the examples.
    pairs : tuple of (int, int)
        Expert and target layers; every method steers these target layers.
    steer : ExpertSteer
        Settings of the alignment and the directions.
    expert_texts, target_texts : States, optional
        Of the models on the texts alignments are fitted on; default: on the examples. The
        paper's auto-encoder needs the expert's alone.
    alignment : Alignment, optional
        Fitted on plain text alone; the method "transferred" needs it.
    """

    examples: LabelledExamples
    expert_states: States
    target_states: States
    pairs: tuple[tuple[int, int], ...]
    steer: ExpertSteer
    expert_texts: States | None = None
    target_texts: States | None = None
    alignment: Alignment | None = None

    def direction(
        self, finder: DirectionFinder, states: torch.Tensor, examples: LabelledExamples
    ) -> torch.Tensor:
        """Return a finder's unit direction in some states of the examples."""
        layers = states[:, None]
        ((fitted, _),) = fit_directions(finder, layers, examples, self.steer.bandwidths)
        return torch.as_tensor(fitted.direction_).float().cpu()


def _own(finder: DirectionFinder) -> Callable[[Material, int], Vectors]:
    def vectors(material: Material, seed: int) -> Vectors:
        return {
            j: material.direction(finder, material.target_states.layer(j), material.examples)
            for _, j in material.pairs
        }

    return vectors


def _rfm(material: Material, seed: int) -> Vectors:
    # Another finder of the expert's directions has a row of its own.
    chosen = material.steer.direction
    is_rfm = isinstance(chosen, RecursiveFeatureMachine)
    return _own(chosen if is_rfm else RecursiveFeatureMachine())(material, seed)


def _random(material: Material, seed: int) -> Vectors:
    rng = np.random.default_rng(seed)
    width = material.target_states.description.model.width
    draws = {j: torch.from_numpy(rng.standard_normal(width)).float() for _, j in material.pairs}
    return {j: draw / draw.norm() for j, draw in draws.items()}


def _shuffled(material: Material, seed: int) -> Vectors:
    labels = shuffled_labels(material.examples, seed)
    examples = dataclasses.replace(material.examples, labels=labels)
    return _rfm(dataclasses.replace(material, examples=examples), seed)


def shuffled_labels(examples: LabelledExamples, seed: int) -> np.ndarray:
    """Return labels permuted within each split, so that both classes stay in each."""
    rng = np.random.default_rng(seed)
    labels = examples.labels.copy()
    splits = np.asarray(examples.splits)
    for split in np.unique(splits):
        rows = np.flatnonzero(splits == split)
        labels[rows] = rng.permutation(labels[rows])
    return labels


def _encoded(material: Material, aligner: Aligner) -> Vectors:
    """Return the directions of the expert's states after an encoder of each layer pair."""
    expert = material.expert_texts or material.expert_states
    target = material.target_texts or material.target_states
    width = target.description.model.width
    vectors = {}
    for i, j in material.pairs:
        met = target.layer(j) if aligner.needs_target_states else None
        fitted = aligner.unfitted().fit(expert.layer(i), met, target_width=width)
        states = torch.as_tensor(fitted.encode(material.expert_states.layer(i)))
        vectors[j] = material.direction(material.steer.direction, states, material.examples)
    return vectors


def _paper(material: Material, seed: int) -> Vectors:
    return _encoded(material, ExpertSteer.paper(seed=seed).aligner)


def _expertsteer(material: Material, seed: int) -> Vectors:
    return _encoded(material, material.steer.aligner)


def _transferred(material: Material, seed: int) -> Vectors:
    if material.alignment is None:
        raise ParameterError(
            "Got the method 'transferred' without an alignment, but expected one fitted on plain "
            "text. Give plain text."
        )
    vectors = {}
    for i, j in material.pairs:
        states = material.expert_states.layer(i)
        direction = material.direction(material.steer.direction, states, material.examples)
        vectors[j] = material.alignment.encode_direction(i, j, direction)
    return vectors


@dataclass(frozen=True)
class Method:
    """A way to get vectors.

    Attributes
    ----------
    label : str
        What tables call it.
    vectors : callable
        From a `Material` and a seed to one unit vector a target layer.
    seeded : bool
        Whether comparisons repeat it with a second seed.
    """

    label: str
    vectors: Callable[[Material, int], Vectors]
    seeded: bool = False


METHODS: dict[str, Method] = {
    "random": Method("random vector", _random),
    "shuffled": Method("target RFM, shuffled labels", _shuffled),
    "mean_difference": Method("target mean difference (CAA)", _own(MeanDifference())),
    "pca": Method("target principal component (RepE)", _own(PrincipalComponent())),
    "probe": Method("target logistic probe (ITI)", _own(LogisticProbe())),
    "rfm": Method("target RFM", _rfm),
    "expertsteer_paper": Method("paper's auto-encoder", _paper, seeded=True),
    "expertsteer": Method("ExpertSteer", _expertsteer),
    "transferred": Method("transferred, plain text only", _transferred),
}


def method_vectors(name: str, material: Material, seed: int = 0) -> Vectors:
    """Return the vectors of a method, one of unit length a target layer.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    material : Material
    seed : int, default=0
        Of random vectors, shuffled labels and the paper's auto-encoder.

    Returns
    -------
    dict of int to Tensor of shape (d_target,)

    Raises
    ------
    ParameterError
        On an unknown method.
    """
    if name not in METHODS:
        raise ParameterError(f"Got method={name!r}, but expected one of {', '.join(METHODS)}.")
    return METHODS[name].vectors(material, seed)
