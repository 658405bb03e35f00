"""Steer a language model with vectors taken from another one.

The four steps are four rooms, in the order the data flows: `expertsteer.alignment`,
`expertsteer.pairing`, `expertsteer.directions`, `expertsteer.steering`. `ExpertSteer` runs
them from end to end and returns a `SteeringPack`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertsteer.alignment import Alignment
    from expertsteer.data import LabelledExamples, load_examples
    from expertsteer.errors import ExpertSteerError
    from expertsteer.models import LanguageModel, ModelSource, load_model
    from expertsteer.pack import SteeringPack
    from expertsteer.pipeline import ExpertSteer, fit_alignment
    from expertsteer.states import States, collect_states

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "ExpertSteer",
    "ExpertSteerError",
    "LabelledExamples",
    "LanguageModel",
    "ModelSource",
    "States",
    "SteeringPack",
    "__version__",
    "collect_states",
    "fit_alignment",
    "load_examples",
    "load_model",
]

# Where each name lives: torch and transformers load when one is first used.
_HOMES = {
    "Alignment": "alignment",
    "ExpertSteer": "pipeline",
    "ExpertSteerError": "errors",
    "LabelledExamples": "data",
    "LanguageModel": "models",
    "ModelSource": "models",
    "States": "states",
    "SteeringPack": "pack",
    "collect_states": "states",
    "fit_alignment": "pipeline",
    "load_examples": "data",
    "load_model": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'expertsteer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"expertsteer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
