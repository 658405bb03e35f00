"""What an artifact remembers of how it was made."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from expertsteer.estimator import Estimator

__all__ = ["describe_settings", "package_versions"]


def describe_settings(estimator: Estimator) -> dict[str, Any]:
    """Return an estimator's class and parameters as JSON types."""
    return {"name": type(estimator).__name__} | estimator.get_params(deep=False)


def package_versions() -> dict[str, str]:
    """Return the versions that decide what numbers come out."""
    names = ("expertsteer", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
