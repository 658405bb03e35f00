"""Choose the RFM's bandwidth by how well it ranks held-out states."""

from __future__ import annotations

from collections.abc import Sequence

from expertsteer.arrays import Array
from expertsteer.directions.base import auc
from expertsteer.directions.recursive_feature_machine import (
    NoGradientError,
    RecursiveFeatureMachine,
)
from expertsteer.errors import ParameterError

__all__ = ["BANDWIDTHS", "search_bandwidth"]

# Usual for concept vectors: Beaglehole et al. 2025, arXiv 2502.03708.
BANDWIDTHS = (1.0, 10.0, 100.0)


def search_bandwidth(
    X: Array,  # noqa: N803
    y: Array,
    X_validation: Array,  # noqa: N803
    y_validation: Array,
    *,
    bandwidths: Sequence[float] = BANDWIDTHS,
    rfm: RecursiveFeatureMachine | None = None,
) -> tuple[RecursiveFeatureMachine, dict[float, float]]:
    """Fit one RFM a bandwidth and keep the one that ranks validation states best.

    Parameters
    ----------
    X, y : arrays of shape (n, width) and (n,)
        Training states and labels (+1, -1).
    X_validation, y_validation : arrays of shape (m, width) and (m,)
        Held-out states and labels.
    bandwidths : sequence of float, default=(1, 10, 100)
        In the units of the states.
    rfm : RecursiveFeatureMachine, optional
        Supplies the other settings.

    Returns
    -------
    rfm : RecursiveFeatureMachine
        Fitted with the best bandwidth; the smaller one on ties.
    scores : dict of float to float
        Validation AUC of every bandwidth; one so small against the states' distances
        that no gradient is left is missing here.

    Raises
    ------
    DataError
        If no bandwidth leaves a gradient.

    Notes
    -----
    Source: Beaglehole et al. 2025, arXiv 2502.03708.
    """
    if not bandwidths:
        raise ParameterError("Got no bandwidths, but expected at least one.")
    template = rfm or RecursiveFeatureMachine()
    fitted: dict[float, RecursiveFeatureMachine] = {}
    scores: dict[float, float] = {}
    failure: NoGradientError | None = None
    for bandwidth in bandwidths:
        candidate = template.unfitted()
        candidate.bandwidth = bandwidth
        try:
            fitted[bandwidth] = candidate.fit(X, y)
        except NoGradientError as error:
            failure = error
            continue
        scores[bandwidth] = auc(fitted[bandwidth], X_validation, y_validation)
    if failure is not None and not scores:
        raise failure
    best = max(scores, key=lambda bandwidth: scores[bandwidth])
    return fitted[best], scores
