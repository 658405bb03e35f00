"""The plan of a study: which cells there are, and what decides each of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

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
    """

    target: ModelSettings
    benchmark: Benchmark
    arm: ArmSettings
    expert: ModelSettings | None = None

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
        """Return a hash of all settings that decide the cell's figures."""
        decisive = {"budget", "damage", "strength_shares", "layer_depths", "positions", "n_plain"}
        if self.arm.uses_plain_text:
            decisive |= {"plain_text", "n_beginnings"}
        settings = [
            self.target.model_dump(exclude={"name", "device", "device_map"}),
            self.benchmark.examples.fingerprint,
            self.benchmark.settings.model_dump(include={"open", "n_shots", "max_new_tokens"}),
            self.benchmark.seed,
            self.arm.model_dump(exclude={"name"}),
            self.expert.model_dump(exclude={"name", "device", "device_map"})
            if self.expert
            else None,
            {} if self.arm.method == "none" else study.model_dump(mode="json", include=decisive),
            self.benchmark.instruction if self.arm.method == "prompt" else "",
        ]
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
    cells = []
    for model in models_of(study):
        for benchmark in benchmarks:
            cells.append(Cell(model, benchmark, _NONE))
            if model not in study.targets:
                continue
            for arm in study.methods:
                if arm.method == "none":
                    continue
                cells += [
                    Cell(model, benchmark, arm, expert) for expert in _experts(study, arm, model)
                ]
    return cells


def models_of(study: StudySettings) -> list[ModelSettings]:
    """Return experts first: targets read their states."""
    return list(dict.fromkeys((*study.experts, *study.targets)))


def _experts(
    study: StudySettings, arm: ArmSettings, target: ModelSettings
) -> list[ModelSettings | None]:
    if not arm.needs_expert:
        return [None]
    if arm.expert == "target":
        return [target]
    named = [e for e in study.experts if arm.expert in (None, e.name)]
    return [expert for expert in named if expert != target]
