"""Choose the layer pairs: mutual information between layers, and selections from it."""

from __future__ import annotations

from expertsteer.pairing.information import ESTIMATORS, mutual_information_table
from expertsteer.pairing.selection import STRATEGIES, same_depth_pairs, select_pairs

__all__ = [
    "ESTIMATORS",
    "STRATEGIES",
    "mutual_information_table",
    "same_depth_pairs",
    "select_pairs",
]
