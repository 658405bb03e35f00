"""Open whatever this package saved, by what the file says it is."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from expertsteer.alignment import Alignment
from expertsteer.errors import PackError
from expertsteer.pack import SteeringPack
from expertsteer.states import States

__all__ = ["open_artifact"]


def open_artifact(path: str | Path) -> SteeringPack | Alignment | States:
    """Open a steering pack, an alignment or a folder of saved states.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    SteeringPack, Alignment or States

    Raises
    ------
    PackError
        If it is none of them.
    StatesError
        If a folder holds no finished states.
    """
    path = Path(path)
    if path.is_dir():
        return States.load(path)
    if not path.is_file():
        raise PackError(f"Got {path}, but there is no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("format")
    except (SafetensorError, OSError) as error:
        raise PackError(
            f"Got {path}, but it is truncated or not a safetensors file ({error})."
        ) from error
    return Alignment.load(path) if kind == "expertsteer-alignment" else SteeringPack.load(path)
