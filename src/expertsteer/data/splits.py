"""Splits: their names, what each serves, and how missing ones are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expertsteer.errors import DataError, ParameterError

__all__ = ["SPLITS", "Row", "assign_splits", "complete_splits", "draw_splits"]

SPLITS = ("train", "validation", "test")

# Where a row stands, for messages, and its fields.
Row = tuple[str, dict[str, Any]]

# Names in use for files and on the hub.
_ROLE_OF = {
    "train": "train",
    "training": "train",
    "auxiliary_train": "train",
    "validation": "validation",
    "validation_matched": "validation",
    "validation_mismatched": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "test_matched": "test",
    "test_mismatched": "test",
}


def assign_splits(rows: list[Row], roles: Mapping[str, str] | None, source: str) -> list[Row]:
    """Return rows whose column "split" says train, validation or test.

    Parameters
    ----------
    rows : list of (str, dict)
        From `read_rows`. The split may have any name in use for one of the three, such as
        "dev" or "auxiliary_train", or be missing.
    roles : mapping of str to str, optional
        From train, validation or test to the split of the file that serves as it, such as
        {"test": "validation"}. That split serves as nothing else, and no other split serves
        as that; splits of unknown names are left out.
    source : str
        For messages.

    Returns
    -------
    list of (str, dict)

    Raises
    ------
    DataError
        If a split has an unknown name and no ``roles`` are given, or the file lacks one of
        those in ``roles``.
    ParameterError
        If a role is none of the three, or two roles name the same split.
    """
    roles = dict(roles or {})
    serves = {split: role for role, split in roles.items()}
    for role in roles:
        if role not in SPLITS:
            raise ParameterError(f"Got the role {role!r}, but expected one of {', '.join(SPLITS)}.")
    if len(serves) < len(roles):
        raise ParameterError(f"Got roles={roles}, but expected each split to serve as one.")
    present = {str(row["split"]) for _, row in rows if row.get("split") is not None}
    for split, role in serves.items():
        if split not in present:
            raise DataError(
                f"Got the split {split!r} as {role}, but {source} has the splits "
                f"{', '.join(sorted(present)) or 'none'}."
            )
    assigned: list[Row] = []
    for place, row in rows:
        value = row.get("split")
        if value is None:
            assigned.append((place, row))
            continue
        role = serves.get(str(value))
        if role is None:
            role = _ROLE_OF.get(str(value).strip().lower())
            if roles and (role is None or role in roles):
                continue
        if role is None:
            raise DataError(
                f"{place}: got split={value!r}, but expected train, validation or test. Say what "
                "serves as which with roles (--role test=SPLIT)."
            )
        assigned.append((place, row | {"split": role}))
    return assigned


def draw_splits(
    n: int, fractions: tuple[float, float, float], rng: np.random.Generator
) -> list[str]:
    """Return a split for each of n rows.

    Parameters
    ----------
    n : int
    fractions : tuple of 3 float
        Of train, validation and test.
    rng : Generator

    Raises
    ------
    ParameterError
        Unless the fractions are from 0 up and sum to 1.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0):
        raise ParameterError(
            f"Got split_fractions={fractions}, but expected three numbers from 0 up that sum to 1."
        )
    bounds = np.round(np.cumsum(fractions) * n).astype(int)
    names = [""] * n
    for place, index in enumerate(rng.permutation(n)):
        names[index] = SPLITS[min(int(np.searchsorted(bounds, place, side="right")), 2)]
    return names


def complete_splits(
    given: Sequence[str],
    groups: Sequence[str],
    labels: np.ndarray,
    source: str,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
) -> list[str]:
    """Return a split for each row: those given, or drawn ones, which the rows of a group share.

    Parameters
    ----------
    given : sequence of n str
        A split in every row, or "" in every row.
    groups : sequence of n str
    labels : ndarray of shape (n,), int8
        +1 or -1. Groups of each class, by their first row, are drawn apart, so that every
        split gets its share of both.
    source : str
        For messages.
    fractions : tuple of 3 float, default=(0.6, 0.2, 0.2)
        Of train, validation and test.
    seed : int, default=0

    Raises
    ------
    DataError
        If some rows have a split and others have none.
    """
    if all(given):
        return list(given)
    if any(given):
        raise DataError(
            f"Got {source} with a split in some rows only, but expected one in every row or none."
        )
    first = {group: int(label) for group, label in reversed(list(zip(groups, labels, strict=True)))}
    names: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for label in (1, -1):
        members = [group for group, value in first.items() if value == label]
        names |= dict(zip(members, draw_splits(len(members), fractions, rng), strict=True))
    return [names[group] for group in groups]
