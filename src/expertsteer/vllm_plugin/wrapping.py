"""Wrap what vLLM offers no hook for, once a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["wrap_once"]

_MARK = "wrapped_by_expertsteer"


def wrap_once(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a function of a class or module by one around it, if it is not yet.

    Parameters
    ----------
    owner : type or module
    name : str
        Of the function.
    wrapper : callable
        Takes the function, returns what replaces it.
    """
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    replacement = functools.wraps(original)(wrapper(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)
