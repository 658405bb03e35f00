"""Step 3: steering vectors from labelled states."""

from expertsteer.directions.base import DirectionFinder, auc
from expertsteer.directions.baselines import LogisticProbe, MeanDifference, PrincipalComponent
from expertsteer.directions.recursive_feature_machine import RecursiveFeatureMachine
from expertsteer.directions.search import BANDWIDTHS, search_bandwidth

__all__ = [
    "BANDWIDTHS",
    "DIRECTIONS",
    "DirectionFinder",
    "LogisticProbe",
    "MeanDifference",
    "PrincipalComponent",
    "RecursiveFeatureMachine",
    "auc",
    "search_bandwidth",
]

# Names as they are used on the command line, in settings and in tables.
DIRECTIONS: dict[str, type[DirectionFinder]] = {
    "rfm": RecursiveFeatureMachine,
    "mean_difference": MeanDifference,
    "pca": PrincipalComponent,
    "probe": LogisticProbe,
}
