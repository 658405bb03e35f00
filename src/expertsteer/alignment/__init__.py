"""Step 1: align the expert's hidden width with the target's."""

from expertsteer.affine import Affine
from expertsteer.alignment.artifact import Alignment
from expertsteer.alignment.autoencoder import AlignedAutoEncoder, AutoEncoder
from expertsteer.alignment.base import Aligner
from expertsteer.alignment.regression import CCA, Procrustes, Ridge

__all__ = [
    "ALIGNERS",
    "CCA",
    "Affine",
    "AlignedAutoEncoder",
    "Aligner",
    "Alignment",
    "AutoEncoder",
    "Procrustes",
    "Ridge",
]

# Names as they are used on the command line, in settings and in tables.
ALIGNERS: dict[str, type[Aligner]] = {
    "reconstruction": AutoEncoder,
    "aligned": AlignedAutoEncoder,
    "ridge": Ridge,
    "procrustes": Procrustes,
    "cca": CCA,
}
