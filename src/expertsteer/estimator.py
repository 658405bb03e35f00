"""What alignments and direction finders share: parameters that can be listed and copied."""

from __future__ import annotations

from sklearn.base import BaseEstimator, clone
from typing_extensions import Self

__all__ = ["Estimator"]


class Estimator(BaseEstimator):
    """An estimator in scikit-learn's manner.

    Parameters are stored untouched by ``__init__`` and checked in ``fit``; results are
    attributes with a trailing underscore.
    """

    def unfitted(self) -> Self:
        """Return a copy with the same parameters and no results."""
        return clone(self)  # type: ignore[return-value]
