"""Errors whose message is meant for the user: value, expectation, next step.

The command line prints them as one line and exits with status 1. Anything else
that escapes is a bug of this package.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "ExpertSteerError",
    "ModelError",
    "PackError",
    "ParameterError",
    "StatesError",
]


class ExpertSteerError(Exception):
    """Base of every error this package raises on purpose."""


class ParameterError(ExpertSteerError, ValueError):
    """A setting is outside what it may be."""


class DataError(ExpertSteerError, ValueError):
    """A data file or an array cannot be used as it is."""


class ModelError(ExpertSteerError, ValueError):
    """A model cannot be loaded, or cannot be steered."""


class StatesError(ExpertSteerError, ValueError):
    """Saved states are unreadable or belong to something else."""


class PackError(ExpertSteerError, ValueError):
    """A steering pack or an alignment is unreadable or does not fit the model."""
