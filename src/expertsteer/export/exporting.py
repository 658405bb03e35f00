"""From a pack to the files of other programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertsteer.errors import ExpertSteerError, ParameterError
from expertsteer.export.arrays import description_path, write_npz, write_safetensors
from expertsteer.export.gguf import write_control_vector
from expertsteer.export.job import ExportJob
from expertsteer.export.lm_eval import write_steer_file
from expertsteer.export.peft import write_adapter
from expertsteer.export.weights import write_checkpoint
from expertsteer.files import require_writable
from expertsteer.models import LanguageModel, ModelSource, load_model
from expertsteer.pack import SteeringPack

__all__ = ["FORMATS", "ExportFormat", "Exported", "export_pack", "written_files"]


@dataclass(frozen=True)
class ExportFormat:
    """A format that packs can be written in.

    Attributes
    ----------
    write : callable
        Writes an `ExportJob` to a path and returns what it wrote, in words.
    suffix : str or None
        Of the file, appended where missing; None where a folder is written.
    loads_target : bool
        Whether the target itself is needed.
    has_description : bool
        Whether a JSON file beside it says what it is.
    """

    write: Callable[[ExportJob, Path], str]
    suffix: str | None
    loads_target: bool = False
    has_description: bool = False


FORMATS: dict[str, ExportFormat] = {
    "gguf": ExportFormat(write_control_vector, ".gguf"),
    "lm-eval": ExportFormat(write_steer_file, ".pt"),
    "weights": ExportFormat(write_checkpoint, None, loads_target=True),
    "peft": ExportFormat(write_adapter, None, loads_target=True),
    "torch": ExportFormat(write_safetensors, ".safetensors", has_description=True),
    "numpy": ExportFormat(write_npz, ".npz", has_description=True),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    path : Path
        The file or folder.
    description : str
        What it is, in words.
    """

    path: Path
    description: str


def export_pack(
    pack: SteeringPack,
    path: str | Path,
    to: str,
    *,
    strength: float | None = None,
    target: str | ModelSource | LanguageModel | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write a pack for another program, at one strength, for every token.

    Parameters
    ----------
    pack : SteeringPack
    path : str or Path
        The file, whose ending is appended where missing, or the folder.
    to : {"gguf", "lm-eval", "weights", "peft", "torch", "numpy"}
        "gguf" for llama.cpp, "lm-eval" for the harness's own model "steered", "weights"
        for an ordinary checkpoint, "peft" for an adapter, "torch" and "numpy" for plain
        arrays (safetensors and npz) with a JSON beside them.
    strength : float, optional
        Relative to the mean residual norm; default: the pack's own.
    target : str, ModelSource or LanguageModel, optional
        The model, for "weights" and "peft"; default: the one the pack names.
    force : bool, default=False
        Accept another model of the same depth and width, such as a fine-tune.
    overwrite : bool, default=False
        Replace a folder that is there. A file is replaced as everywhere in this package.

    Returns
    -------
    Exported

    Raises
    ------
    ParameterError
        On an unknown format or a wrong strength.
    PackError
        If the pack is for another model, or steers what the format cannot.
    ModelError
        If the target cannot be loaded, or cannot hold the vectors.
    ExpertSteerError
        If the path cannot be written, or a needed package is missing.
    """
    if to not in FORMATS:
        raise ParameterError(f"Got to={to!r}, but expected one of {', '.join(FORMATS)}.")
    chosen = FORMATS[to]
    path = _checked_path(written_files(path, to), chosen, overwrite)
    vectors = {j: v.detach().cpu() for j, v in pack.scaled_vectors(strength).items()}
    model = None
    if chosen.loads_target:
        model = load_model(pack.target.name if target is None else target)
        pack.check_target(model, force=force)
    value = pack.resolve_strength(strength)
    job = ExportJob(pack, value, dict(sorted(vectors.items())), model, overwrite)
    return Exported(path, chosen.write(job, path))


def written_files(path: str | Path, to: str) -> tuple[Path, ...]:
    """Return the files, or the folder, that a pack is written to in a format.

    Parameters
    ----------
    path : str or Path
        As in `export_pack`.
    to : str
        One of `FORMATS`.
    """
    path, chosen = Path(path), FORMATS[to]
    if chosen.suffix is None:
        return (path,)
    if path.suffix != chosen.suffix:
        path = path.with_name(path.name + chosen.suffix)
    return (path, description_path(path)) if chosen.has_description else (path,)


def _checked_path(written: tuple[Path, ...], chosen: ExportFormat, overwrite: bool) -> Path:
    """Return the file or folder, or raise before any work where it cannot be written."""
    path = written[0]
    if chosen.suffix is not None:
        for each in written:
            require_writable(each)
        return path
    if os.path.lexists(path) and not path.is_dir():
        raise ExpertSteerError(f"Cannot write the folder {path}: it is a file.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ExpertSteerError(
            f"Got the folder {path}, which holds something, but expected a new one. Name another "
            "folder, or pass overwrite=True (--overwrite)."
        )
    require_writable(path.parent / f"{path.name}.json")
    return path
