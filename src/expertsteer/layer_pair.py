"""A pair of layers and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerPair"]


@dataclass(frozen=True)
class LayerPair:
    """An expert layer, the target layer it steers, and what was measured of them.

    Attributes
    ----------
    expert_layer, target_layer : int
        0-based blocks.
    mutual_information : float or None
        Between the two layers' states, in nats.
    r2 : float or None
        Held-out R^2 of the encoded expert states against the target's.
    reconstruction_error : float or None
        Held-out, relative to the variance of the expert's states.
    auc : float or None
        Validation AUC of the direction on the encoded expert states.
    """

    expert_layer: int
    target_layer: int
    mutual_information: float | None = None
    r2: float | None = None
    reconstruction_error: float | None = None
    auc: float | None = None
