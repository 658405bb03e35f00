"""Selections from a table worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertsteer.errors import DataError, ParameterError
from expertsteer.pairing import same_depth_pairs, select_pairs

# Rows: 2 expert layers; columns: 4 target layers.
TABLE = np.array([[5.0, 1.0, 3.0, 2.0], [4.0, 1.5, 3.0, 0.5]])


def test_lowest_first_and_every_target_once():
    # 1.5 is lower than 3.0, but target layer 1 is already taken with 1.0.
    assert select_pairs(TABLE) == [(1, 3)]
    assert select_pairs(TABLE, "lowest_mi", 4) == [(1, 3), (0, 1), (0, 2), (1, 0)]


def test_highest_first():
    assert select_pairs(TABLE, "highest_mi", 3) == [(0, 0), (0, 2), (0, 3)]


@pytest.mark.parametrize("strategy", ["lowest_mi", "highest_mi"])
def test_ties_go_to_the_first_layers(strategy):
    assert select_pairs(np.ones((3, 3)), strategy, 2) == [(0, 0), (0, 1)]


def test_close_values_are_not_ties():
    assert select_pairs(torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64)) == [(0, 1)]


@pytest.mark.parametrize(
    ("shape", "n_pairs", "expected"),
    [
        ((2, 5), 1, [(1, 2)]),
        ((9, 5), 1, [(4, 2)]),
        ((9, 5), 5, [(0, 0), (2, 1), (4, 2), (6, 3), (8, 4)]),
        ((24, 12), 3, [(4, 2), (13, 6), (21, 10)]),
        ((7, 1), 1, [(3, 0)]),
        ((1, 3), 2, [(0, 0), (0, 2)]),
    ],
)
def test_same_depth(shape, n_pairs, expected):
    assert select_pairs(np.full(shape, np.nan), "same_depth", n_pairs) == expected


def test_explicit_pairs_are_returned_in_their_order():
    pairs = [(1, 2), (1, 0)]
    assert select_pairs(TABLE, "explicit", pairs=pairs) == pairs


@pytest.mark.parametrize(
    "pairs", [[(2, 0)], [(0, 4)], [(-1, 0)], [(0, 1.0)], [(0, 1, 2)], [(0, 1), (1, 1)], []]
)
def test_explicit_pairs_are_checked(pairs):
    with pytest.raises(ParameterError, match=r"Got .*pair"):
        select_pairs(TABLE, "explicit", pairs=pairs)


def test_pairs_belong_to_explicit():
    with pytest.raises(ParameterError, match="without pairs"):
        select_pairs(TABLE, "explicit")
    with pytest.raises(ParameterError, match="with pairs"):
        select_pairs(TABLE, "lowest_mi", pairs=[(0, 0)])


@pytest.mark.parametrize("strategy", ["lowest_mi", "highest_mi", "same_depth"])
@pytest.mark.parametrize("n_pairs", [0, 5])
def test_number_of_pairs_out_of_range(strategy, n_pairs):
    with pytest.raises(ParameterError, match=r"n_pairs=.*from 1 to 4, the number of target"):
        select_pairs(TABLE, strategy, n_pairs)


def test_unknown_strategy_lists_the_options():
    with pytest.raises(ParameterError, match=r"'validated'.*lowest_mi, highest_mi, same_depth"):
        select_pairs(TABLE, "validated")


def test_table_must_be_a_finite_table():
    with pytest.raises(DataError, match="NaN"):
        select_pairs(np.array([[1.0, np.nan]]))
    with pytest.raises(DataError, match=r"shape \(4,\)"):
        select_pairs(TABLE[0])


@pytest.mark.parametrize(("n_expert", "n_target"), [(30, 18), (18, 30), (5, 5), (1, 4), (12, 32)])
def test_same_depth_pairs_cover_both_models(n_expert, n_target):
    pairs = same_depth_pairs(n_expert, n_target)
    assert len(pairs) == max(n_expert, n_target)
    assert {expert for expert, _ in pairs} == set(range(n_expert))
    assert {target for _, target in pairs} == set(range(n_target))
    assert pairs == sorted(pairs)


def test_same_depth_pairs_by_hand():
    assert same_depth_pairs(3, 5) == [(0, 0), (1, 1), (1, 2), (2, 3), (2, 4)]
    assert same_depth_pairs(5, 3) == [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_same_depth_pairs_need_layers():
    with pytest.raises(ParameterError, match="n_target_layers=0"):
        same_depth_pairs(3, 0)
