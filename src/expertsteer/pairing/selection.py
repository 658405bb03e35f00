"""Choose which expert layer steers which target layer."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import numpy as np
import torch

from expertsteer.arrays import Array
from expertsteer.errors import DataError, ParameterError
from expertsteer.pairing.checks import check_integer

__all__ = ["STRATEGIES", "same_depth_pairs", "select_pairs"]

STRATEGIES = ("lowest_mi", "highest_mi", "same_depth", "explicit")


def select_pairs(
    table: Array,
    strategy: str = "lowest_mi",
    n_pairs: int = 1,
    pairs: Iterable[tuple[int, int]] | None = None,
) -> list[tuple[int, int]]:
    """Choose pairs of layers; no target layer appears twice.

    Parameters
    ----------
    table : ndarray or Tensor of shape (n_expert_layers, n_target_layers)
        Mutual information in nats. ``"same_depth"`` and ``"explicit"`` use only its shape.
    strategy : {"lowest_mi", "highest_mi", "same_depth", "explicit"}, default="lowest_mi"
        - ``"lowest_mi"``: the least information first, where the models differ most (ExpertSteer,
          Wang et al. 2025).
        - ``"highest_mi"``: the most information first.
        - ``"same_depth"``: target layers spread evenly (the middle one for a single pair), each
          with the expert layer of the same relative depth.
        - ``"explicit"``: ``pairs`` as given, checked.
    n_pairs : int, default=1
        How many pairs; not used by ``"explicit"``.
    pairs : iterable of (int, int), optional
        Expert and target layers, 0-based, for ``"explicit"`` only.

    Returns
    -------
    list of (int, int)
        (expert layer, target layer), best first; equal values in the order of the target layer,
        then of the expert layer.

    Raises
    ------
    ParameterError
        On an unknown strategy, more pairs than target layers, pairs out of range or with a target
        layer twice, or ``pairs`` missing or given to another strategy.
    DataError
        If the table is not 2-dimensional and, where its values matter, finite.
    """
    values = _as_table(table)
    if strategy not in STRATEGIES:
        raise ParameterError(
            f"Got strategy={strategy!r}, but expected one of {', '.join(STRATEGIES)}."
        )
    if (strategy == "explicit") != (pairs is not None):
        raise ParameterError(
            f"Got strategy={strategy!r} {'without' if pairs is None else 'with'} pairs, but "
            'expected pairs with "explicit" and only there.'
        )
    if pairs is not None:
        return _checked_pairs(pairs, values.shape)
    n_experts, n_targets = values.shape
    n_pairs = check_integer("n_pairs", n_pairs, n_targets, ", the number of target layers")
    if strategy == "same_depth":
        targets = [(2 * k + 1) * n_targets // (2 * n_pairs) for k in range(n_pairs)]
        return [(_same_depth(t, n_targets, n_experts), t) for t in targets]
    if not np.isfinite(values).all():
        raise DataError(
            "Got a table with NaN or infinite values, but expected finite mutual information. "
            "Estimate it again from finite states."
        )
    cost = values if strategy == "lowest_mi" else -values
    experts = cost.argmin(axis=0)
    order = np.argsort(cost.min(axis=0), kind="stable")[:n_pairs]
    return [(int(experts[target]), int(target)) for target in order]


def same_depth_pairs(n_expert_layers: int, n_target_layers: int) -> list[tuple[int, int]]:
    """Match every layer of both models to one of the same relative depth.

    First goes with first and last with last; in between the relative depth is rounded to the
    nearest layer.

    Parameters
    ----------
    n_expert_layers, n_target_layers : int
        Decoder blocks of the two models.

    Returns
    -------
    list of (int, int)
        (expert layer, target layer), as many as the deeper model has layers, in order of depth.

    Raises
    ------
    ParameterError
        If either number is not a positive integer.
    """
    n_expert_layers = check_integer("n_expert_layers", n_expert_layers)
    n_target_layers = check_integer("n_target_layers", n_target_layers)
    if n_expert_layers >= n_target_layers:
        return [
            (layer, _same_depth(layer, n_expert_layers, n_target_layers))
            for layer in range(n_expert_layers)
        ]
    return [
        (_same_depth(layer, n_target_layers, n_expert_layers), layer)
        for layer in range(n_target_layers)
    ]


def _same_depth(layer: int, n_layers: int, n_other: int) -> int:
    """Layer of the other model at the same relative depth, halves rounded up."""
    if n_layers == 1:
        return n_other // 2
    return (2 * layer * (n_other - 1) + n_layers - 1) // (2 * (n_layers - 1))


def _as_table(table: Array) -> np.ndarray:
    # In float64, since float32 could turn close values into ties.
    values = torch.as_tensor(table).detach().cpu().to(torch.float64).numpy()
    if values.ndim != 2 or 0 in values.shape:
        raise DataError(
            f"Got a table with shape {values.shape}, but expected 2 dimensions: expert layers and "
            "target layers."
        )
    return values


def _checked_pairs(
    pairs: Iterable[tuple[int, int]], shape: tuple[int, ...]
) -> list[tuple[int, int]]:
    checked: list[tuple[int, int]] = []
    for pair in pairs:
        whole = len(pair) == 2 and all(isinstance(layer, Integral) for layer in pair)
        if not whole or not all(0 <= layer < size for layer, size in zip(pair, shape, strict=True)):
            raise ParameterError(
                f"Got the pair {pair!r}, but expected an expert layer from 0 to {shape[0] - 1} and "
                f"a target layer from 0 to {shape[1] - 1}."
            )
        checked.append((int(pair[0]), int(pair[1])))
    targets = [target for _, target in checked]
    if not targets or len(set(targets)) < len(targets):
        raise ParameterError(
            f"Got pairs={checked}, but expected at least one pair and every target layer at most "
            "once."
        )
    return checked
