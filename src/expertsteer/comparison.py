"""The honest comparison: every way to get a vector, at the same layers and strength."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from expertsteer.alignment import Alignment, Ridge
from expertsteer.data import EffectWords, LabelledExamples
from expertsteer.errors import PackError, ParameterError
from expertsteer.evaluation.effect import perplexity, word_log_odds
from expertsteer.evaluation.intervals import mean_interval
from expertsteer.layer_pair import LayerPair
from expertsteer.methods import METHODS, Material, method_vectors
from expertsteer.models import LanguageModel, ModelSource, load_model
from expertsteer.pack import SteeringPack
from expertsteer.pipeline import ExpertSteer
from expertsteer.provenance import describe_machine, package_versions

__all__ = ["Comparison", "ComparisonRow", "compare"]

_DEFAULT_METHODS = tuple(name for name in METHODS if name not in ("pca", "probe"))


@dataclass(frozen=True)
class ComparisonRow:
    """What one kind of vector does to the target.

    Attributes
    ----------
    method : str
        Where the vector comes from.
    cosine : float or None
        With the target's own mean difference, averaged over the layers.
    effect : float
        Mean change of the log-odds of positive over negative words, in nats.
    effect_interval : tuple of (float, float)
        95 % bootstrap interval of the effect over the prompts.
    perplexity : float
        Of plain sentences.
    """

    method: str
    cosine: float | None
    effect: float
    effect_interval: tuple[float, float]
    perplexity: float


@dataclass(frozen=True)
class Comparison:
    """Rows of a comparison and what they share.

    Attributes
    ----------
    rows : tuple of ComparisonRow
    pairs : tuple of LayerPair
        Expert and target layers every row uses.
    strength : float
        Relative to the mean residual norm, at every layer.
    n_prompts, n_sentences : int
        What effect and perplexity were measured on.
    provenance : dict
        Models, data, seeds, versions and machine.
    """

    rows: tuple[ComparisonRow, ...]
    pairs: tuple[LayerPair, ...]
    strength: float
    n_prompts: int
    n_sentences: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON types."""
        return dataclasses.asdict(self)


def compare(
    target: LanguageModel | ModelSource | str | Path,
    expert: LanguageModel | ModelSource | str | Path,
    data: LabelledExamples,
    words: EffectWords,
    *,
    pack: SteeringPack,
    steer: ExpertSteer | None = None,
    alignment_text: Sequence[str] | None = None,
    plain_text: Sequence[str] | None = None,
    alignment: Alignment | None = None,
    methods: Sequence[str] | None = None,
    strength: float | None = None,
    seeds: Sequence[int] = (0, 1),
    force: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare a pack with the baselines it has to beat, at the pack's layers.

    Vectors come from the train split and bandwidths from the validation split. Every
    row adds vectors of equal length at the same target layers.

    Parameters
    ----------
    target, expert : LanguageModel, ModelSource, str or Path
    data : LabelledExamples
        What the pack was fitted on.
    words : EffectWords
        Prompts, words and plain sentences; they should not occur in ``data``.
    pack : SteeringPack
        The pack in question; supplies the layer pairs.
    steer : ExpertSteer, optional
        The settings the pack was fitted with; default: `ExpertSteer()`.
    alignment_text : sequence of str, optional
        Texts the auto-encoders are fitted on; default: the labelled ones.
    plain_text : sequence of str, optional
        Unlabelled text for the row "transferred, plain text only"; None leaves it out.
    alignment : Alignment, optional
        Fitted before on plain text, in place of ``plain_text``.
    methods : sequence of str, optional
        Keys of `METHODS`; default: all but "pca" and "probe", and "transferred" only with
        plain text.
    strength : float, optional
        Default: the pack's.
    seeds : sequence of int, default=(0, 1)
        Of the random vectors, shuffled labels and paper's auto-encoders (the first seed
        alone serves the first two).
    force : bool, default=False
        See `SteeringPack.check_target`.
    cache_dir : Path, optional
        Where collected states are found.
    progress : bool, default=True

    Returns
    -------
    Comparison

    Raises
    ------
    ParameterError
        On an unknown method, or a strength that is zero or not finite.
    PackError
        If the pack was made for another model, or names no layer pair for a layer.
    """
    steer = steer or ExpertSteer()
    value = pack.resolve_strength(strength)
    layers = tuple((pair.expert_layer, pair.target_layer) for pair in pack.pairs)
    if sorted(j for _, j in layers) != list(pack.layers):
        raise PackError(
            f"Got a pack that steers the layers {', '.join(map(str, pack.layers))} and names the "
            f"layer pairs {', '.join(f'{i}:{j}' for i, j in layers) or 'none'}, but expected a "
            "pair for each layer: a comparison makes the other vectors from them. Give a pack "
            "that fit has made."
        )
    target_model = load_model(target)
    pack.check_target(target_model, force=force)
    examples = data.for_fitting()
    corpus = examples if alignment_text is None else alignment_text
    if methods is None:
        methods = [n for n in _DEFAULT_METHODS if n != "transferred" or plain_text or alignment]
    for name in methods:
        if name not in METHODS:
            raise ParameterError(f"Got method={name!r}, but expected one of {', '.join(METHODS)}.")
    common: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    expert_states, expert_texts = steer.collect(expert, examples, corpus, **common)
    target_states = steer.collect(target_model, examples, **common)[0]
    if "transferred" in methods and alignment is None and plain_text is not None:
        plain_expert = steer.collect(expert, plain_text, **common)[0]
        plain_target = steer.collect(target_model, plain_text, **common)[0]
        alignment = Alignment.fit(plain_expert, plain_target, layers, Ridge(), progress=progress)
    material = Material(
        examples, expert_states, target_states, layers, steer, expert_texts, alignment=alignment
    )
    reference = method_vectors("mean_difference", material)
    runs = [(n, s) for n in methods for s in (seeds if METHODS[n].seeded else seeds[:1])]

    unsteered = word_log_odds(target_model, words)
    rows = [
        ComparisonRow(
            "unsteered", None, 0.0, (0.0, 0.0), perplexity(target_model, words.plain_sentences)
        )
    ]
    for name, seed in tqdm(runs, desc="comparison", delay=1, disable=not progress):
        # The pack itself is in question, however it was made.
        own = name == "expertsteer"
        vectors = pack.vectors if own else method_vectors(name, material, seed)
        label = METHODS[name].label + (f", seed {seed}" if METHODS[name].seeded else "")
        candidate = dataclasses.replace(pack, vectors=vectors, encoders={})
        with candidate.apply(target_model, value, force=force):
            change = (word_log_odds(target_model, words) - unsteered).numpy()
            damaged = perplexity(target_model, words.plain_sentences)
        cosine = float(np.mean([float(vectors[j] @ reference[j]) for _, j in layers]))
        rows.append(
            ComparisonRow(label, cosine, float(change.mean()), mean_interval(change), damaged)
        )
    return Comparison(
        rows=tuple(rows),
        pairs=pack.pairs,
        strength=value,
        n_prompts=len(words.prompts),
        n_sentences=len(words.plain_sentences),
        provenance={
            "target": target_model.description.to_dict(),
            "expert": expert_states.description.model.to_dict(),
            "data": examples.summary(),
            "n_plain_texts": None if plain_text is None else len(plain_text),
            "seeds": list(seeds),
            "pack": pack.provenance,
            "versions": package_versions(),
            "machine": describe_machine(),
        },
    )
