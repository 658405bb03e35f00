"""What every direction finder has in common."""

from __future__ import annotations

import abc

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from typing_extensions import Self

from expertsteer.arrays import Array, as_labels, as_states, like
from expertsteer.errors import DataError
from expertsteer.estimator import Estimator

__all__ = ["DirectionFinder", "auc", "require_variation"]


class DirectionFinder(Estimator, abc.ABC):
    """Base of the methods that turn labelled states into a steering vector.

    Attributes
    ----------
    direction_ : array of shape (width,)
        Unit vector, oriented so that the states' projections rise with the label.
    directions_ : array of shape (k, width)
        The leading directions, unit vectors, the first of them ``direction_``.
    """

    direction_: Array
    directions_: Array

    def fit(self, X: Array, y: Array) -> Self:  # noqa: N803 - scikit-learn's names
        """Find the direction.

        Parameters
        ----------
        X : array of shape (n, width)
            States, one row a text.
        y : array of shape (n,)
            +1 for the wanted behaviour, -1 for its opposite.

        Returns
        -------
        self

        Raises
        ------
        DataError
            On states that are not finite or do not vary, and on labels that are not
            +1 and -1 or of one class only.
        ParameterError
            On settings out of range.
        """
        self._check_parameters()
        states = as_states("X", X)
        labels = as_labels(y, len(states)).to(states.device)
        require_variation(states)
        return self._finish(self._solve(states, labels), states, labels, X)

    def fit_layers(self, X: Array, y: Array) -> list[Self]:  # noqa: N803
        """Find a direction in each of many layers, in one batch where the method has one.

        Parameters
        ----------
        X : array of shape (n, n_layers, width)
            States, one row a text, as `States` holds them.
        y : array of shape (n,)
            +1 for the wanted behaviour, -1 for its opposite.

        Returns
        -------
        list of DirectionFinder
            A fitted copy a layer.

        Raises
        ------
        DataError, ParameterError
            As `fit`.
        """
        self._check_parameters()
        states = as_states("X", X, ndim=3)
        return [self.unfitted().fit(like(layer, X), y) for layer in states.unbind(1)]

    def _finish(
        self, directions: torch.Tensor, states: torch.Tensor, labels: torch.Tensor, given: Array
    ) -> Self:
        """Keep directions as unit vectors that point to the wanted end."""
        directions = directions / directions.norm(dim=1, keepdim=True)
        # Only the correlation with the labels tells which end of an axis is wanted.
        projections = (states - states.mean(0)) @ directions.T
        slope = projections.T @ (labels - labels.mean())
        directions = directions * torch.where(slope < 0, -1.0, 1.0)[:, None]
        self.directions_ = like(directions, given)
        self.direction_ = self.directions_[0]
        return self

    def predict(self, X: Array) -> Array:  # noqa: N803
        """Score states: higher means nearer to the wanted behaviour.

        Parameters
        ----------
        X : array of shape (m, width)

        Returns
        -------
        array of shape (m,)
            The projection on ``direction_``, unless the method has a model of its own.
        """
        states = as_states("X", X, min_rows=1)
        return like(states @ torch.as_tensor(self.direction_).to(states.device), X)

    @abc.abstractmethod
    def _solve(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the directions, (k, width), strongest first, of any sign and length."""

    def _check_parameters(self) -> None:
        """Raise ParameterError on settings out of range."""


def require_variation(states: torch.Tensor) -> None:
    """Raise DataError where all rows of some states, (n, width), are equal."""
    if not bool((states != states[0]).any()):
        raise DataError("Got X whose rows are all equal, but expected states that vary.")


def auc(finder: DirectionFinder, X: Array, y: Array) -> float:  # noqa: N803
    """Return the area under the ROC curve of a fitted finder's scores.

    Parameters
    ----------
    finder : DirectionFinder
    X : array of shape (m, width)
    y : array of shape (m,)
        +1 and -1, both present.

    Returns
    -------
    float
        1 is perfect, 0.5 is chance.
    """
    return float(roc_auc_score(np.asarray(y), torch.as_tensor(finder.predict(X)).cpu().numpy()))
