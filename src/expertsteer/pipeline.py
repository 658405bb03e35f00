"""The method from end to end: states, layer pairs, alignment, directions, pack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import Self

from expertsteer.alignment import AlignedAutoEncoder, Aligner, Alignment, AutoEncoder, Ridge
from expertsteer.alignment.artifact import check_paired, information_between
from expertsteer.arrays import Array
from expertsteer.data import LabelledExamples, RenderedText, render
from expertsteer.directions import (
    BANDWIDTHS,
    DirectionFinder,
    RecursiveFeatureMachine,
    auc,
    search_bandwidth,
)
from expertsteer.errors import DataError, PackError, ParameterError
from expertsteer.evaluation.preference import choose_by_preference, require_model
from expertsteer.layer_pair import LayerPair
from expertsteer.models import (
    LanguageModel,
    ModelSource,
    explain_mismatch,
    load_model,
    locate_model,
)
from expertsteer.pack import DEFAULT_STRENGTH, SteeringPack
from expertsteer.pairing import same_depth_pairs, select_pairs
from expertsteer.processes import made_by_main
from expertsteer.provenance import describe_settings, package_versions
from expertsteer.states import States, collect_states, corpus_fingerprint, states_key
from expertsteer.steering import check_strength

__all__ = ["ExpertSteer", "ModelOrStates", "fit_alignment", "fit_directions", "render_corpus"]

ModelOrStates = LanguageModel | ModelSource | str | Path | States
# The least for "validated", which fits an encoder to each and steers the target with it.
_CANDIDATES = 6


@dataclass(frozen=True)
class ExpertSteer:
    """Steer a target model with vectors of an external expert.

    Parameters
    ----------
    aligner : Aligner
        Step 1; default: `AlignedAutoEncoder`. `ExpertSteer.paper` uses `AutoEncoder`.
    estimator : {"gaussian", "ksg", "kernel"}
        Step 2: how mutual information is estimated.
    strategy : {"validated", "lowest_mi", "highest_mi", "same_depth", "explicit"}
        Step 2: how layer pairs are chosen from the table; see `select_pairs`.
        "validated" takes a short list by highest mutual information and keeps the pairs
        whose vectors move the target's preference on the validation split most;
        "lowest_mi" is the paper's.
    n_pairs : int, default=1
        Step 2: how many pairs; "explicit" uses all of ``pairs``.
    pairs : tuple of (int, int), optional
        Expert and target layers for "explicit".
    direction : DirectionFinder
        Step 3; default: `RecursiveFeatureMachine`.
    bandwidths : tuple of float
        Tried by validation AUC where ``direction`` is a `RecursiveFeatureMachine`;
        empty: its own bandwidth as it is.
    strength : float, optional
        Step 4: what the pack proposes for each layer, and what "validated" tries; default:
        0.1 of the mean residual norm, shared by the layers (one that is tried alone has all
        of it).
    position : {"last", "answer_mean", "prompt_last"}
        Token position states are read from.
    chat_template : bool
        Put the texts into each model's chat template.
    keep_encoders : bool
        Store the encoders in the pack.

    Examples
    --------
    >>> from expertsteer import ExpertSteer
    >>> ExpertSteer.paper().aligner
    AutoEncoder(solver='gradient')
    """

    aligner: Aligner = field(default_factory=AlignedAutoEncoder)
    estimator: str = "gaussian"
    strategy: str = "validated"
    n_pairs: int = 1
    pairs: tuple[tuple[int, int], ...] | None = None
    direction: DirectionFinder = field(default_factory=RecursiveFeatureMachine)
    bandwidths: tuple[float, ...] = BANDWIDTHS
    strength: float | None = None
    position: str = "last"
    chat_template: bool = False
    keep_encoders: bool = False

    @classmethod
    def paper(cls, *, n_pairs: int = 1, seed: int = 0) -> Self:
        """Return exactly the paper's method.

        An auto-encoder trained by gradient descent on the expert's states alone, the
        pairs of lowest mutual information, and RFM with the usual bandwidths and ridge.

        Parameters
        ----------
        n_pairs : int, default=1
            How many layer pairs.
        seed : int, default=0
            Starting weights of the auto-encoder.
        """
        return cls(
            aligner=AutoEncoder(solver="gradient", random_state=seed),
            strategy="lowest_mi",
            n_pairs=n_pairs,
            direction=RecursiveFeatureMachine(bandwidth_mode="constant", ridge=1e-3),
        )

    def fit(
        self,
        target: ModelOrStates,
        expert: ModelOrStates,
        data: LabelledExamples,
        *,
        alignment: Alignment | None = None,
        alignment_text: list[str] | None = None,
        cache_dir: Path | None = None,
        progress: bool = True,
    ) -> SteeringPack:
        """Make a steering pack for a target from an expert and labelled texts.

        Parameters
        ----------
        target, expert : LanguageModel, ModelSource, str, Path or States
            The models, their names (loaded one after the other and released), or their
            collected states on ``data``. What follows from the states of a model on one GPU
            is computed there.
        data : LabelledExamples
            Vectors come from its train split, choices from its validation split; its
            test split is never read.
        alignment : Alignment, optional
            Fitted before; then no labelled text passes through the target (unless the
            strategy is "validated").
        alignment_text : list of str, optional
            Unlabelled texts to fit the alignment on; default: the labelled ones.
        cache_dir : Path, optional
            Where collected states are kept and found again.
        progress : bool, default=True
            Show progress bars for what takes over a second.

        Returns
        -------
        SteeringPack

        Raises
        ------
        ExpertSteerError
            On unusable data, models or settings, naming the value and the remedy.
        """
        examples = data.for_fitting()
        examples.require_both_classes()
        self._check_settings()
        if alignment is not None and alignment_text is not None:
            raise ParameterError("Got both alignment and alignment_text, but expected one of them.")
        if self.strategy == "validated":
            require_model(target)
            examples.require_both_classes("validation", min_rows=1)
        if alignment is not None:
            self._check_target(target, alignment)
        elif isinstance(target, ModelSource | str | Path):
            # A wrong name should not cost the minutes of collecting from the expert.
            locate_model(target.name if isinstance(target, ModelSource) else target)
        paired_texts = examples if alignment_text is None else alignment_text

        collect: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
        target_paired: States | None = None
        if alignment is None:
            expert_states, expert_paired = self.collect(expert, examples, paired_texts, **collect)
            if self.strategy == "validated" and not isinstance(target, States):
                target = load_model(target)  # read now and steered later
            (target_paired,) = self.collect(target, paired_texts, **collect)
        else:
            (expert_states,) = self.collect(expert, examples, **collect)
            expert_paired = expert_states

        def fit() -> SteeringPack:
            known = alignment
            if target_paired is not None:
                known = self._align(target_paired, expert_paired, None, progress)
            assert known is not None
            pack = self._fit_directions(known, expert_states, examples)
            if self.strategy == "validated":
                validation = data.split("validation")
                pack = choose_by_preference(
                    pack, target, validation, self.n_pairs, self.chat_template
                )
            return pack if self.strength is not None else pack.at_default_strength()

        # Several processes share the reading; what follows takes one.
        return made_by_main(fit, SteeringPack.save, SteeringPack.load, "the fit")

    def _fit_directions(
        self, alignment: Alignment, expert_states: States, examples: LabelledExamples
    ) -> SteeringPack:
        """Choose the pairs and make the pack of their vectors."""
        chosen = self._pairs_of(alignment, expert_states)

        # Step 3: a direction a pair, from the encoded states of the expert.
        encoded = [
            torch.as_tensor(alignment.encode(i, j, expert_states.layer(i)))
            for i, j in ((pair.expert_layer, pair.target_layer) for pair in chosen)
        ]
        found = fit_directions(self.direction, torch.stack(encoded, 1), examples, self.bandwidths)
        vectors, measured = {}, []
        for pair, (finder, score) in zip(chosen, found, strict=True):
            vectors[pair.target_layer] = torch.as_tensor(finder.direction_).cpu()
            measured.append(dataclasses.replace(pair, auc=score))

        return SteeringPack(
            vectors=vectors,
            mean_residual_norms={j: alignment.mean_residual_norms[j] for j in vectors},
            target=alignment.target,
            expert=alignment.expert,
            pairs=tuple(measured),
            strength=DEFAULT_STRENGTH if self.strength is None else self.strength,
            encoders=alignment.encoders if self.keep_encoders else {},
            provenance=self._provenance(examples, alignment),
        )

    def align(
        self,
        target: ModelOrStates,
        expert: ModelOrStates,
        texts: LabelledExamples | Sequence[str],
        *,
        pairs: Sequence[tuple[int, int]] | None = None,
        cache_dir: Path | None = None,
        progress: bool = True,
    ) -> Alignment:
        """Choose layer pairs and fit an encoder for each; no label is looked at.

        Parameters
        ----------
        target, expert : LanguageModel, ModelSource, str, Path or States
            Models given by name are loaded one after the other and released.
        texts : LabelledExamples or sequence of str
            What both models read.
        pairs : sequence of (int, int), optional
            Expert and target layers; default: by this method's strategy. (For
            "validated" these are its candidates.)
        cache_dir : Path, optional
            Where collected states are kept and found again.
        progress : bool, default=True

        Returns
        -------
        Alignment
        """
        collect: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
        (expert_states,) = self.collect(expert, texts, **collect)
        (target_states,) = self.collect(target, texts, **collect)

        def fit() -> Alignment:
            return self._align(target_states, expert_states, pairs, progress)

        return made_by_main(fit, Alignment.save, Alignment.load, "the alignment")

    def _align(
        self,
        target_states: States,
        expert_states: States,
        pairs: Sequence[tuple[int, int]] | None,
        progress: bool,
    ) -> Alignment:
        check_paired(expert_states, target_states)
        # Step 2 before step 1: information does not change under an encoder, so encoders
        # are fitted for the chosen pairs alone.
        table = information_between(expert_states, target_states, self.estimator)
        chosen = self._candidate_pairs(table) if pairs is None else pairs
        return Alignment.fit(
            expert_states, target_states, chosen, self.aligner, table=table, progress=progress
        )

    def collect(
        self,
        source: ModelOrStates,
        *corpora: LabelledExamples | Sequence[str],
        cache_dir: Path | None,
        progress: bool,
    ) -> list[States]:
        """Return the states of a model on each corpus; a corpus named twice is read once."""
        if isinstance(source, States):
            if any(corpus is not corpora[0] for corpus in corpora):
                raise ParameterError(
                    "Got collected states and alignment_text, but expected a model: states on "
                    "another text cannot be collected from states."
                )
            self._check_states(source, corpora[0])
            return [source] * len(corpora)
        model = load_model(source)
        states: dict[int, States] = {}
        for corpus in corpora:
            if id(corpus) in states:
                continue
            texts = render_corpus(corpus, model, self.chat_template)
            folder = cache_dir / states_key(model, texts, self.position) if cache_dir else None
            states[id(corpus)] = collect_states(
                model, texts, position=self.position, save_to=folder, progress=progress
            )
        return [states[id(corpus)] for corpus in corpora]

    def _check_settings(self) -> None:
        """Raise on settings that would otherwise fail after minutes of collecting."""
        if self.strength is not None:
            check_strength(self.strength)
        if (self.strategy == "explicit") != (self.pairs is not None):
            raise ParameterError(
                f"Got strategy={self.strategy!r} {'with' if self.pairs else 'without'} pairs, but "
                "expected pairs with strategy='explicit' and only there."
            )
        for bandwidth in self.bandwidths:
            if not (math.isfinite(bandwidth) and bandwidth > 0):
                raise ParameterError(
                    f"Got bandwidth={bandwidth}, but expected a positive finite number."
                )

    def _check_target(self, target: ModelOrStates, alignment: Alignment) -> None:
        """Raise where the target at hand is not the one that an alignment leads to.

        A name is not looked up: the target need not be there.
        """
        if isinstance(target, States):
            found = target.description.model
        elif isinstance(target, LanguageModel):
            found = target.description
        else:
            name = str(target.name if isinstance(target, ModelSource) else target)
            known = alignment.target.name
            if self.strategy == "validated" or Path(name).name == Path(known).name:
                return  # "validated" loads it, and compares then
            raise PackError(
                f"Got the target {name!r} with an alignment to {known!r}, but expected that one. "
                "Leave the target out, or name the model as the alignment does."
            )
        difference = explain_mismatch(alignment.target, found)
        if difference:
            raise PackError(
                f"Got the target {found.name!r} with an alignment to {alignment.target.name!r}, "
                f"but expected that one: {difference}."
            )

    def _check_states(self, states: States, corpus: LabelledExamples | Sequence[str]) -> None:
        found = states.description
        if found.corpus != corpus_fingerprint(render_corpus(corpus)):
            raise DataError(
                f"Got states of {found.n_texts} texts ({found.corpus}), but expected those of the "
                f"{len(corpus)} texts given (train and validation splits). Collect them from the "
                "same file with the same seed."
            )
        if found.position != self.position:
            raise ParameterError(
                f"Got states collected at position={found.position!r}, but this method reads "
                f"position={self.position!r}. Choose the same."
            )
        states.require_all_layers()

    def _candidate_pairs(
        self, table: torch.Tensor, n_targets: int | None = None
    ) -> list[tuple[int, int]]:
        if self.strategy != "validated":
            return select_pairs(table, self.strategy, self.n_pairs, self.pairs)
        most = table.shape[1] if n_targets is None else n_targets
        n_candidates = max(self.n_pairs, min(max(_CANDIDATES, 2 * self.n_pairs), most))
        # Each target layer with the expert layer that knows most about it: the layers of
        # lowest information are those where the expert has read nothing yet.
        return select_pairs(table, "highest_mi", n_candidates)

    def _pairs_of(self, alignment: Alignment, expert_states: States) -> list[LayerPair]:
        difference = explain_mismatch(alignment.expert, expert_states.description.model)
        if difference:
            raise PackError(
                f"Got an alignment from {alignment.expert.name!r} and states of "
                f"{expert_states.description.model.name!r}, but expected one expert: {difference}."
            )
        known = {(pair.expert_layer, pair.target_layer): pair for pair in alignment.pairs}
        # Pairs without an encoder are put where the strategy looks last.
        information = alignment.mutual_information
        lowest_first = self.strategy == "lowest_mi"
        last = information.max() + 1 if lowest_first else information.min() - 1
        table = torch.full_like(information, float(last))
        for i, j in known:
            table[i, j] = information[i, j]
        n_targets = len({pair.target_layer for pair in alignment.pairs})
        chosen = self._candidate_pairs(table, n_targets)
        missing = [f"{i}:{j}" for i, j in chosen if (i, j) not in known]
        if missing:
            listed = ", ".join(f"{i}:{j}" for i, j in known)
            raise ParameterError(
                f"Got an alignment of the pairs {listed}, but strategy={self.strategy!r} with "
                f"n_pairs={self.n_pairs} asks for {', '.join(missing)}. Choose another strategy or "
                "align those layers too."
            )
        return [known[pair] for pair in chosen]

    def _provenance(self, examples: LabelledExamples, alignment: Alignment) -> dict[str, Any]:
        settings = {
            "aligner": alignment.provenance["aligner"],
            "direction": describe_settings(self.direction),
        }
        return {
            "settings": dataclasses.asdict(self) | settings,
            "data": examples.summary(),
            "alignment": alignment.provenance,
            "versions": package_versions(),
        }


def render_corpus(
    corpus: LabelledExamples | Sequence[str],
    model: LanguageModel | None = None,
    chat_template: bool = False,
) -> list[RenderedText]:
    """Return labelled examples or plain texts as one model reads them.

    Only a chat template needs the model; plain texts are never put into one.
    """
    if isinstance(corpus, LabelledExamples):
        return render(corpus, model.tokenizer if model else None, chat_template)
    return [RenderedText(text, 0, False) for text in corpus]


def fit_directions(
    direction: DirectionFinder,
    states: Array,
    examples: LabelledExamples,
    bandwidths: tuple[float, ...] = BANDWIDTHS,
) -> list[tuple[DirectionFinder, float | None]]:
    """Fit directions on the train rows of some states and score them on the validation rows.

    Parameters
    ----------
    direction : DirectionFinder
        Supplies the settings; fresh copies are fitted.
    states : array of shape (n, n_layers, width)
        One row an example.
    examples : LabelledExamples
        Labels and splits of the rows.
    bandwidths : tuple of float
        Tried by validation AUC for a `RecursiveFeatureMachine`.

    Returns
    -------
    list of (DirectionFinder, float or None), one a layer
        Fitted; and the validation AUC, None without a validation split of both classes.

    Raises
    ------
    DataError
        If a layer's states do not vary, or leave a machine without gradient.
    """
    states = torch.as_tensor(states)
    splits = np.asarray(examples.splits)
    train = torch.from_numpy(splits == "train")
    validation = torch.from_numpy(splits == "validation")
    labels = torch.from_numpy(examples.labels.astype("float32"))
    can_score = len(set(labels[validation].tolist())) == 2
    if isinstance(direction, RecursiveFeatureMachine) and bandwidths and can_score:
        searched = search_bandwidth(
            states[train],
            labels[train],
            states[validation],
            labels[validation],
            bandwidths=bandwidths,
            rfm=direction,
        )
        return [(finder, scores[finder.bandwidth]) for finder, scores in searched]
    fitted = direction.fit_layers(states[train], labels[train])
    if not can_score:
        return [(finder, None) for finder in fitted]
    held_out = states[validation].unbind(1)
    return [
        (finder, auc(finder, layer, labels[validation]))
        for finder, layer in zip(fitted, held_out, strict=True)
    ]


def fit_alignment(
    target: LanguageModel | ModelSource | str | Path,
    expert: LanguageModel | ModelSource | str | Path,
    texts: Sequence[str],
    *,
    aligner: Aligner | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    estimator: str = "gaussian",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Alignment:
    """Align two models on plain text, without any label.

    Parameters
    ----------
    target, expert : LanguageModel, ModelSource, str or Path
        The models or their names; names are loaded one after the other.
    texts : sequence of str
        Beginnings of sentences are best, see `sentence_beginnings`: their last tokens
        are as varied as what a model generates.
    aligner : Aligner, optional
        Default: `Ridge`, whose strength is chosen by leave-one-out error.
    pairs : sequence of (int, int), optional
        0-based expert and target layers; default: every layer of the deeper model with
        the layer of the other at the same relative depth.
    estimator : {"gaussian", "ksg", "kernel"}, default="gaussian"
        Of the mutual information table that is stored along.
    cache_dir : Path, optional
        Where collected states are kept and found again.
    progress : bool, default=True

    Returns
    -------
    Alignment

    Notes
    -----
    Source: this project.
    """
    steer = ExpertSteer(aligner=aligner or Ridge(), estimator=estimator)
    collect: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    (expert_states,) = steer.collect(expert, texts, **collect)
    (target_states,) = steer.collect(target, texts, **collect)
    if pairs is None:
        pairs = same_depth_pairs(len(expert_states.layers), len(target_states.layers))
    return steer.align(target_states, expert_states, texts, pairs=pairs, progress=progress)
