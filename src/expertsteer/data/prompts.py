"""Prompts that a model continues."""

from __future__ import annotations

from pathlib import Path

from expertsteer.data.effect import EffectWords
from expertsteer.data.plain import load_plain_lines

__all__ = ["load_prompts"]


def load_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file.

    Parameters
    ----------
    path : str or Path
        A JSON (``.json``) or YAML (``.yaml``, ``.yml``) file as `EffectWords.load` reads
        it: its ``generation_prompts``, or its ``prompts`` where there are none. Any other
        file is UTF-8 text, a line a prompt.

    Returns
    -------
    list of str
        At least one.

    Raises
    ------
    DataError
        If the file is missing, unreadable or empty.
    """
    if Path(path).suffix.lower() in (".json", ".yaml", ".yml"):
        words = EffectWords.load(path)
        return words.generation_prompts or words.prompts
    return load_plain_lines(path)
