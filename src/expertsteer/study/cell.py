"""The plan of a study: which cells there are, and what decides each of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from expertsteer.study.plain import PlainText
from expertsteer.study.settings import ArmSettings, ModelSettings, StudySettings
from expertsteer.study.subjects import Benchmark, load_benchmark

__all__ = ["Cell", "cells_of", "models_of"]

_NONE = ArmSettings(method="none")


@dataclass(frozen=True, eq=False)
class Cell:
    """What is measured once.

    Attributes
    ----------
    target : ModelSettings
    benchmark : Benchmark
    arm : ArmSettings
    expert : ModelSettings or None
    plain : PlainText
    """

    target: ModelSettings
    benchmark: Benchmark
    arm: ArmSettings
    expert: ModelSettings | None
    plain: PlainText

    def identity(self) -> dict[str, Any]:
        """Return what tables know the cell by."""
        return {
            "target": self.target.name,
            "benchmark": self.benchmark.settings.name,
            "method": self.arm.name,
            "expert": self.expert.name if self.expert else None,
            "seed": self.benchmark.seed,
        }

    def fingerprint(self, study: StudySettings) -> str:
        """Return a hash of all that decides the cell's figures."""
        settings: list[Any] = [
            [*self.target.identity(), self.target.dtype],
            self.benchmark.fingerprint(),
            # Without defaults, so that a new setting leaves the old cells as they are.
            self.arm.model_dump(mode="json", exclude={"name", "expert"}, exclude_defaults=True)
            | {"aligner": self.arm.aligner_name},
        ]
        # With defaults: what the default alignment and machine are decides these cells.
        if self.arm.needs_expert:
            settings.append(self.arm.steer().aligner.get_params())
        if self.arm.uses_rfm:
            settings.append(self.arm.steer().direction.get_params())
        if self.arm.method == "prompt":
            settings.append(self.benchmark.instruction)
        if self.arm.method != "none":
            n_beginnings = self.arm.n_beginnings or study.n_beginnings
            read = n_beginnings if self.arm.uses_plain_text else 0
            settings += [study.damage, read, self.plain.fingerprint(read, self.arm.plain_source)]
        if self.arm.is_vector:
            decisive = {"budget", "strength_shares", "layer_depths", "positions"}
            settings.append(study.model_dump(mode="json", include=decisive))
        if self.expert is not None:
            settings.append([*self.expert.identity(), self.expert.dtype])
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def cells_of(study: StudySettings) -> list[Cell]:
    """Return the cells of a study in the order they are run: a model at a time.

    Raises
    ------
    DataError
        On an unusable data set.
    """
    benchmarks = [
        load_benchmark(study, settings, seed)
        for settings in study.benchmarks
        for seed in study.seeds
    ]
    plain = PlainText.load(study)
    cells = []
    for model in models_of(study):
        for benchmark in benchmarks:
            cells.append(Cell(model, benchmark, _NONE, None, plain))
            if model not in study.targets:
                continue
            for arm in study.methods:
                if arm.method == "none":
                    continue
                cells += [
                    Cell(model, benchmark, arm, expert, plain)
                    for expert in _experts(study, arm, model)
                ]
    return cells


def models_of(study: StudySettings) -> list[ModelSettings]:
    """Return experts first: targets read their states."""
    return list({model.name: model for model in (*study.experts, *study.targets)}.values())


def _experts(
    study: StudySettings, arm: ArmSettings, target: ModelSettings
) -> list[ModelSettings | None]:
    if not arm.needs_expert:
        return [None]
    if arm.expert == "target":
        return [target]
    named = [e for e in study.experts if arm.expert in (None, e.name)]
    return [expert for expert in named if expert != target]
