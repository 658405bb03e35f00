"""Choose the RFM's bandwidth by how well it ranks held-out states."""

from __future__ import annotations

from collections.abc import Sequence

from expertsteer.arrays import Array
from expertsteer.directions.base import auc
from expertsteer.directions.recursive_feature_machine import RecursiveFeatureMachine
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
) -> list[tuple[RecursiveFeatureMachine, dict[float, float]]]:
    """Fit one RFM a layer and bandwidth and keep those that rank validation states best.

    Parameters
    ----------
    X, y : arrays of shape (n, n_layers, width) and (n,)
        Training states and labels (+1, -1).
    X_validation, y_validation : arrays of shape (m, n_layers, width) and (m,)
        Held-out states and labels.
    bandwidths : sequence of float, default=(1, 10, 100)
        In the units of the states.
    rfm : RecursiveFeatureMachine, optional
        Supplies the other settings.

    Returns
    -------
    list of (RecursiveFeatureMachine, dict of float to float), one a layer
        Fitted with the best bandwidth, the smaller one on ties; and the validation AUC of
        every bandwidth. One so small against the states' distances that no gradient is
        left is missing there.

    Raises
    ------
    DataError
        If no bandwidth leaves a gradient in some layer.

    Notes
    -----
    Source: Beaglehole et al. 2025, arXiv 2502.03708.
    """
    if not bandwidths:
        raise ParameterError("Got no bandwidths, but expected at least one.")
    template = rfm or RecursiveFeatureMachine()

    def score(layer: int, machine: RecursiveFeatureMachine) -> float:
        return auc(machine, X_validation[:, layer], y_validation)

    return template.search_layers(X, y, bandwidths, score)
