"""One cell of a study: an arm fitted, set to the damage budget, and measured on the test split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertsteer.alignment import Alignment
from expertsteer.alignment.artifact import information_between
from expertsteer.calibration import item_values, strength_at_budget
from expertsteer.data import LabelledExamples
from expertsteer.evaluation.intervals import mean_interval
from expertsteer.evaluation.lower_blocks import LowerBlocks
from expertsteer.methods import Material, method_vectors
from expertsteer.models import LanguageModel, seconds_of_work
from expertsteer.pack import SteeringPack
from expertsteer.pairing import select_pairs
from expertsteer.states import States
from expertsteer.study.drawing import first_questions, with_label_noise
from expertsteer.study.plain import PlainText
from expertsteer.study.settings import ArmSettings, ModelSettings, PlainSource, StudySettings
from expertsteer.study.subjects import Benchmark, Measured, Subject, collect_corpus, instructed

__all__ = ["TargetBench", "measure_unsteered"]

Pairs = tuple[tuple[int, int], ...]
_MAX_STRENGTH = 2.0


class TargetBench:
    """A target in front of a benchmark, and what all its arms share.

    Parameters
    ----------
    study : StudySettings
    target : ModelSettings
    model : LanguageModel
        The target, loaded.
    benchmark : Benchmark
    plain : PlainText
    cache_dir : Path
        Where states are kept.
    damage_on_budget, damage_on_test : callable
        From a steering to the damage it does, see `damage_meter`.
    """

    def __init__(
        self,
        study: StudySettings,
        target: ModelSettings,
        model: LanguageModel,
        benchmark: Benchmark,
        plain: PlainText,
        cache_dir: Path,
        damage_on_budget: Callable[[AbstractContextManager[Any]], float],
        damage_on_test: Callable[[AbstractContextManager[Any]], float],
    ) -> None:
        self.study = study
        self.target = target
        self.model = model
        self.models = {settings.name: settings for settings in (*study.experts, *study.targets)}
        self.benchmark = benchmark
        self.plain = plain
        self.cache_dir = cache_dir
        self.damage_on_budget = damage_on_budget
        self.damage_on_test = damage_on_test
        self.subject = Subject(model, benchmark)
        task, metric = self.subject.validation
        self.unsteered = item_values(model, task, metric)
        # Within a benchmark, arms ask for the same few again and again.
        self.tables: dict[tuple[Any, ...], torch.Tensor] = {}
        self.states = lru_cache(maxsize=8)(self._states)
        self.plain_states = lru_cache(maxsize=8)(self._plain_states)
        self.lower_blocks = LowerBlocks(model)
        self.undamaged = study.undamaged

    # States ---------------------------------------------------------------------------

    def _states(self, name: str, position: str) -> States:
        """Return a model's states on the examples; an expert's have been collected before."""
        return self._collected(name, self.benchmark.fitting, position)

    def _plain_states(self, name: str, source: PlainSource) -> States:
        """Return a model's states on beginnings of plain text."""
        return self._collected(name, self.plain.beginnings[source], "last")

    def _collected(self, name: str, corpus: LabelledExamples | list[str], position: str) -> States:
        loaded = self.model if name == self.target.name else None
        states = collect_corpus(loaded, self.models[name], corpus, position, self.cache_dir)
        return states.on(self.model.algebra_device)

    def table(self, expert: str, arm: ArmSettings) -> torch.Tensor:
        """Return the mutual information of two models' layers, on what an arm may read."""
        # No labelled text of the target's may decide what a transferred vector is made of.
        plain = arm.method == "transferred"
        read = (arm.plain_source, self._n_beginnings(arm)) if plain else (arm.position, arm.n_train)
        key = (expert, arm.estimator, *read)
        if key not in self.tables:
            if plain:
                states = self._paired_plain_states(arm, self.models[expert])
            else:
                _, rows = self._examples(arm)
                both = (expert, self.target.name)
                states = [self.states(name, arm.position).rows(rows) for name in both]
            expert_states, target_states = states
            self.tables[key] = information_between(expert_states, target_states, arm.estimator)
        return self.tables[key]

    # Layers ---------------------------------------------------------------------------

    def choose_layers(self, own: ArmSettings) -> dict[str, Any]:
        """Rank target layers by the validation effect of the target's own mean difference.

        All arms that read the same examples share the choice, so that they differ in their
        vectors alone; that the own vector makes it favours the own-vector methods if any.

        Parameters
        ----------
        own : ArmSettings
            "mean_difference" of the examples that the arms read.

        Returns
        -------
        dict
            ``layers`` (best first), and what was measured of each.
        """
        layers = sorted({self._layer_at(depth) for depth in self.study.layer_depths})
        vectors = method_vectors("mean_difference", self.material(own, None, _own_pairs(layers)))
        found = []
        for layer in layers:
            pack = self._pack({layer: vectors[layer]}, own)
            strength = self._strength(pack)
            effect = self._effect(pack, strength, own) if strength else np.array([-np.inf])
            found.append({"layer": layer, "strength": strength, "effect": float(effect.mean())})
        ranked = sorted(found, key=lambda row: row["effect"], reverse=True)
        for row in found:
            row["effect"] = round(row["effect"], 5) if np.isfinite(row["effect"]) else None
        return {"layers": [row["layer"] for row in ranked], "measured": found}

    def _layer_at(self, depth: float) -> int:
        return round(depth * (len(self.model.blocks) - 1))

    def pairs(
        self, arm: ArmSettings, expert: ModelSettings | None, ranked_layers: Sequence[int]
    ) -> Pairs:
        """Return the layer pairs of an arm."""
        if arm.strategy == "shared":
            layers = list(ranked_layers[: arm.n_pairs])
            if arm.layer_depth is not None:
                layers = [self._layer_at(arm.layer_depth)]
            if expert is None:
                return _own_pairs(layers)
            table = self.table(expert.name, arm)
            return tuple((int(table[:, j].argmax()), j) for j in layers)
        assert expert is not None  # own vectors have no strategy, see `ArmSettings`
        if arm.strategy == "validated":
            examples, _ = self._examples(arm)
            steer = arm.steer(self.benchmark.seed)
            states = self.states(expert.name, arm.position)
            own = self.states(self.target.name, arm.position)
            alignment = steer.align(own, states, examples, progress=False)
            pack = steer.fit(self.model, states, examples, alignment=alignment, progress=False)
            return tuple((pair.expert_layer, pair.target_layer) for pair in pack.pairs)
        table = self.table(expert.name, arm)
        return tuple(select_pairs(table, arm.strategy, arm.n_pairs, arm.pairs))

    # Vectors --------------------------------------------------------------------------

    def material(self, arm: ArmSettings, expert: ModelSettings | None, pairs: Pairs) -> Material:
        """Return what an arm makes its vectors from."""
        examples, rows = self._examples(arm)
        target_states = self.states(self.target.name, arm.position)
        expert_states = self.states((expert or self.target).name, arm.position)
        expert_states, target_states = expert_states.rows(rows), target_states.rows(rows)
        alignment, texts = None, (None, None)
        if arm.uses_plain_text and expert is not None:
            plain = self._paired_plain_states(arm, expert)
            if arm.method == "transferred":
                table = self.table(expert.name, arm)
                alignment = Alignment.fit(
                    *plain, pairs, arm.steer().aligner, table=table, progress=False
                )
            elif arm.alignment_text == "both":
                texts = (_joined(expert_states, plain[0]), _joined(target_states, plain[1]))
            else:
                texts = plain
        steer = arm.steer(self.benchmark.seed)
        return Material(examples, expert_states, target_states, pairs, steer, *texts, alignment)

    def _examples(self, arm: ArmSettings) -> tuple[LabelledExamples, torch.Tensor]:
        """Return the examples an arm reads, and which rows of all they are."""
        examples = self.benchmark.fitting
        rows = list(range(len(examples)))
        if arm.n_train is not None:
            rows = first_questions(examples, arm.n_train)
            examples = examples.subset(rows)
        if arm.label_noise:
            examples = with_label_noise(examples, arm.label_noise, self.benchmark.seed)
        return examples, torch.tensor(rows)

    def _paired_plain_states(
        self, arm: ArmSettings, expert: ModelSettings
    ) -> tuple[States, States]:
        rows = torch.arange(self._n_beginnings(arm))
        expert_states, target_states = (
            self.plain_states(model.name, arm.plain_source).rows(rows)
            for model in (expert, self.target)
        )
        return expert_states, target_states

    def _n_beginnings(self, arm: ArmSettings) -> int:
        return arm.n_beginnings or self.study.n_beginnings

    def _pack(self, vectors: dict[int, torch.Tensor], arm: ArmSettings) -> SteeringPack:
        states = self.states(self.target.name, arm.position)
        return SteeringPack(
            vectors=vectors,
            mean_residual_norms={j: states.mean_residual_norm(j) for j in vectors},
            target=self.model.description,
        )

    # Strength -------------------------------------------------------------------------

    def _positions(self, arm: ArmSettings) -> str:
        return arm.positions or self.study.positions

    def _strength(self, pack: SteeringPack) -> float:
        return strength_at_budget(
            lambda strength: self.damage_on_budget(
                # Damage is what the vector does to text that is read, whichever tokens an
                # arm steers; otherwise steering fewer tokens would cost nothing here.
                pack.apply(self.model, strength, "all")
            ),
            self.study.budget,
            damage=self.study.damage,
            max_strength=_MAX_STRENGTH,
        )

    def _effect(self, pack: SteeringPack, strength: float, arm: ArmSettings) -> np.ndarray:
        task, metric = self.subject.validation
        steering = pack.apply(self.model, strength, self._positions(arm))
        with self.lower_blocks.skipped(steering), steering:
            return item_values(self.model, task, metric) - self.unsteered

    # Cells ----------------------------------------------------------------------------

    def run(
        self,
        arm: ArmSettings,
        expert: ModelSettings | None,
        ranked_layers: Sequence[int],
        adapter: Path,
    ) -> dict[str, Any]:
        """Fit, tune and measure one arm.

        Parameters
        ----------
        arm : ArmSettings
        expert : ModelSettings or None
        ranked_layers : sequence of int
            The target's, best first, as `choose_layers` ranks them.
        adapter : Path
            Folder for what "lora" trains.

        Returns
        -------
        dict
            The cell, as it is written.
        """
        if arm.method == "prompt":
            return self._run_prompt()
        if arm.method == "lora":
            return self._run_lora(arm, adapter)
        # What arms share, states and tables, is read before the clock starts.
        pairs = self.pairs(arm, expert, ranked_layers)
        for settings in (self.target, expert or self.target):
            self.states(settings.name, arm.position)
        if arm.uses_plain_text and expert is not None:
            self._paired_plain_states(arm, expert)
        started = seconds_of_work(self.model)
        material = self.material(arm, expert, pairs)
        # The paper's method is the same call with the paper's settings.
        method = "expertsteer" if arm.method == "expertsteer_paper" else arm.method
        pack = self._pack(method_vectors(method, material, self.benchmark.seed), arm)
        made = seconds_of_work(self.model)
        strongest = self._strength(pack)
        shares = arm.strength_shares or self.study.strength_shares
        tried = []
        for share in shares if strongest else ():
            effect = self._effect(pack, share * strongest, arm)
            tried.append((share, float(effect.mean()), mean_interval(effect)))
        searched = seconds_of_work(self.model)
        cell: dict[str, Any] = {
            "pairs": [list(pair) for pair in pairs],
            "n_train": len(set(material.examples.split("train").groups)),
            "strongest": round(strongest, 6),
            "validation": [
                {"share": share, "effect": round(mean, 5), "interval": _rounded(interval)}
                for share, mean, interval in tried
            ],
        }
        share, _, interval = max(tried, key=lambda row: row[1], default=(0.0, 0.0, (0.0, 0.0)))
        strength = share * strongest
        # What `calibrate` would do: no clear gain on the validation split, no steering.
        cell |= {"strength": round(strength, 6), "beats_zero": interval[0] > 0}
        positions = self._positions(arm)
        steering = pack.apply(self.model, strength, positions) if strength else None
        skipped = self.lower_blocks.seconds_skipped
        cell |= self._measure(steering).to_dict()
        scored = seconds_of_work(self.model)
        # A user reads a question once, with all its blocks.
        skipped = self.lower_blocks.seconds_skipped - skipped
        damage = (
            self.damage_on_test(pack.apply(self.model, strength, "all"))
            if strength
            else self.undamaged
        )
        cell["damage"] = round(damage, 5)
        cell["seconds"] = {
            "fit": round(made - started, 2),
            "strength": round(searched - made, 2),
            "test": round(scored - searched + skipped, 2),
        }
        return cell

    def _measure(
        self, steering: AbstractContextManager[Any] | None, instruction: str = ""
    ) -> Measured:
        steering = steering or nullcontext()
        with self.lower_blocks.skipped(steering), steering:
            return self.subject.measure(instruction)

    def _run_prompt(self) -> dict[str, Any]:
        task, metric = self.subject.validation
        instruction = self.benchmark.instruction
        effect = item_values(self.model, instructed(task, instruction), metric) - self.unsteered
        started = seconds_of_work(self.model)
        test = self._measure(None, instruction)
        seconds = {"fit": 0.0, "test": round(seconds_of_work(self.model) - started, 2)}
        # An instruction stands before questions only: plain text is read as ever.
        return (
            _whole_effect(effect) | test.to_dict() | {"damage": self.undamaged, "seconds": seconds}
        )

    def _run_lora(self, arm: ArmSettings, adapter: Path) -> dict[str, Any]:
        from expertsteer.fine_tuning import ADAPTER_RECORD, adapted, fine_tune

        examples, _ = self._examples(arm)
        folder = fine_tune(self.model, examples, output=adapter, seed=self.benchmark.seed)
        record = json.loads((folder / ADAPTER_RECORD).read_text(encoding="utf-8"))
        task, metric = self.subject.validation
        with adapted(self.model, folder):
            effect = item_values(self.model, task, metric) - self.unsteered
        searched = seconds_of_work(self.model)
        test = self._measure(adapted(self.model, folder))
        seconds = {
            "fit": round(record["training"]["seconds"], 2),
            "test": round(seconds_of_work(self.model) - searched, 2),
        }
        damage = self.damage_on_test(_Adapted(self.model, folder))
        return (
            _whole_effect(effect)
            | {"n_train": len(set(examples.split("train").groups))}
            | test.to_dict()
            | {"damage": round(damage, 5), "seconds": seconds}
        )


class _Adapted:
    """An adapter that can be entered again and again, as a steering can."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        self.model = model
        self.folder = folder

    def __enter__(self) -> None:
        from expertsteer.fine_tuning import adapted

        self.entered = adapted(self.model, self.folder)
        self.entered.__enter__()

    def __exit__(self, *details: Any) -> None:
        self.entered.__exit__(*details)


def measure_unsteered(subject: Subject, undamaged: float) -> dict[str, Any]:
    """Return the cell of a model as it is, with what the questions are."""
    started = seconds_of_work(subject.model)
    test = subject.measure()
    seconds = {"fit": 0.0, "test": round(seconds_of_work(subject.model) - started, 2)}
    about = {
        "items": [question.name for question in subject.test[0].questions],
        "asked": subject.asked(),
        "n_tokens_test": subject.n_tokens_test(),
    }
    return about | test.to_dict() | {"damage": undamaged, "seconds": seconds}


def _own_pairs(layers: list[int]) -> Pairs:
    return tuple((layer, layer) for layer in layers)


def _joined(first: States, second: States) -> States:
    return dataclasses.replace(first, values=torch.cat([first.values, second.values]))


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(value, 5) for value in interval]


def _whole_effect(effect: np.ndarray) -> dict[str, Any]:
    interval = mean_interval(effect)
    tried = {"share": 1.0, "effect": round(float(effect.mean()), 5), "interval": _rounded(interval)}
    return {"validation": [tried], "beats_zero": interval[0] > 0}
