"""Tell what this package saved, by what the file says it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expertsteer.tensor_file import ALIGNMENT_KIND, PACK_KIND, read_description

__all__ = ["STATES_KIND", "describe_artifact"]

STATES_KIND = "saved-states"


def describe_artifact(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Return what a steering pack, an alignment or a folder of saved states holds.

    The files are checked to be whole. torch is loaded for states alone, a shard at
    a time.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    kind : str
        "steering-pack", "alignment" or "saved-states".
    summary : dict
        What the `summary` of its class returns.

    Raises
    ------
    PackError
        If it is none of them.
    StatesError
        If a folder holds no finished states.
    """
    path = Path(path)
    if path.is_dir():
        from expertsteer.states.saved import check_states

        return STATES_KIND, check_states(path).to_dict()
    return read_description(path, (PACK_KIND, ALIGNMENT_KIND))
