"""From the files of other programs to a pack."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from expertsteer.errors import PackError
from expertsteer.export.gguf import read_control_vector
from expertsteer.export.svec import read_svec
from expertsteer.export.vectors import FileVectors
from expertsteer.models import LanguageModel, ModelDescription, ModelSource, load_model
from expertsteer.models.gguf import file_hash
from expertsteer.pack import SteeringPack
from expertsteer.provenance import package_versions
from expertsteer.states import collect_states

__all__ = ["READERS", "import_pack"]

READERS: dict[str, Callable[[Path], FileVectors]] = {
    ".gguf": read_control_vector,
    ".svec": read_svec,
}


def import_pack(
    path: str | Path,
    target: str | ModelSource | LanguageModel,
    texts: Sequence[str],
    *,
    progress: bool = True,
) -> SteeringPack:
    """Make a pack of a file that another program wrote.

    The pack's strength is relative to the target's mean residual norms, which no such
    file holds: they are measured on texts. At the pack's own strength it adds what the
    other program adds at its scale 1.

    Parameters
    ----------
    path : str or Path
        A control vector of llama.cpp or repeng (``.gguf``), or the ``.svec`` of
        activation-steering and AISteer360.
    target : str, ModelSource or LanguageModel
        The model the vectors are for.
    texts : sequence of str
        Plain text to measure the norms on, read at the last token of each.
    progress : bool, default=True
        Show a progress bar when it takes over a second.

    Returns
    -------
    SteeringPack
        Layers whose vector is zero are left out. The vectors have unit length; where a
        file's vectors differ in length relative to the norms, unit length on average.

    Raises
    ------
    PackError
        If the file is missing, damaged, of another kind, or does not fit the target.
    ModelError
        If the target cannot be loaded.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise PackError(f"Got {path}, but expected a file that ends in {' or '.join(READERS)}.")
    if not path.is_file():
        raise PackError(f"Got {path}, but there is no such file.")
    found = READERS[path.suffix](path)
    model = load_model(target)
    _check_fit(path, found, model.description)
    vectors = {j: v for j, v in found.vectors.items() if bool(v.any())}
    if not vectors:
        raise PackError(f"Got {path} with zeros only, but expected a vector.")
    states = collect_states(model, texts, layers=sorted(vectors), progress=progress)
    norms = {j: states.mean_residual_norm(j) for j in states.layers}
    shares = [float(vectors[j].norm()) / norms[j] for j in norms]
    strength = sum(shares) / len(shares)
    return SteeringPack(
        vectors={j: vectors[j] / (norms[j] * strength) for j in norms},
        mean_residual_norms=norms,
        target=model.description,
        strength=strength,
        provenance={
            "imported": {
                "file": path.name,
                "format": found.format,
                "sha256": file_hash(path),
                "model_type": found.model_type,
            },
            "mean_residual_norms": {
                "n_texts": states.description.n_texts,
                "corpus": states.description.corpus,
                "position": states.description.position,
            },
            "versions": package_versions(),
        },
    )


def _check_fit(path: Path, found: FileVectors, target: ModelDescription) -> None:
    for layer, vector in found.vectors.items():
        if layer >= target.n_layers:
            raise PackError(
                f"Got {path} with a vector for layer {layer}, but {target.name} has the layers 0 "
                f"to {target.n_layers - 1}. Name the model the file was made for."
            )
        if len(vector) != target.width:
            raise PackError(
                f"Got {path} with a vector of width {len(vector)} for layer {layer}, but "
                f"{target.name} has width {target.width}. Name the model the file was made for."
            )
        if not bool(vector.isfinite().all()):
            raise PackError(f"Got {path} with NaN or infinity for layer {layer}.")
    # llama.cpp and transformers name the text part of a model differently.
    names = {name.removesuffix("_text") for name in (found.model_type, target.model_type) if name}
    if len(names) > 1:
        warnings.warn(
            f"{path} says it is for a model of type {found.model_type!r}, but {target.name} is of "
            f"type {target.model_type!r}.",
            stacklevel=3,
        )
