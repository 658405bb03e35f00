"""Small files of this project's own writing (CC0)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["shipped_file"]


def shipped_file(name: str) -> Path:
    """Return the path of a file that comes with the package.

    Parameters
    ----------
    name : {"sentiment.jsonl", "sentiment_effect.json", "plain.txt"}

    Returns
    -------
    Path
    """
    return Path(str(files(__name__).joinpath(name)))
