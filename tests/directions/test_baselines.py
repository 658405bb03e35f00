"""Baseline directions on data whose direction is known."""

from __future__ import annotations

import numpy as np
import pytest

from expertsteer.directions import (
    DIRECTIONS,
    LogisticProbe,
    MeanDifference,
    PrincipalComponent,
    auc,
)
from expertsteer.errors import ParameterError


def two_clouds(n=200, d=10, distance=4.0, seed=0):
    rng = np.random.default_rng(seed)
    axis = np.zeros(d)
    axis[2] = 1
    y = np.tile([1, -1], n // 2)
    X = rng.normal(size=(n, d)) + 7 + distance / 2 * np.outer(y, axis)
    return X.astype("float32"), y, axis


@pytest.mark.parametrize("name", DIRECTIONS)
def test_every_finder_points_at_the_positive_cloud(name):
    X, y, axis = two_clouds()
    finder = DIRECTIONS[name]().fit(X, y)
    assert finder.direction_ @ axis > 0.9
    assert finder.directions_.shape[1] == 10
    assert np.linalg.norm(finder.direction_) == pytest.approx(1, rel=1e-5)
    assert auc(finder, X, y) > 0.95
    assert DIRECTIONS[name]().fit(X, -y).direction_ @ axis < -0.9


def test_mean_difference_is_the_mean_difference():
    X, y, _ = two_clouds()
    expected = X[y > 0].mean(0) - X[y < 0].mean(0)
    np.testing.assert_allclose(
        MeanDifference().fit(X, y).direction_, expected / np.linalg.norm(expected), atol=1e-5
    )


def test_principal_components_are_orthogonal_and_uneven_classes_work():
    X, y, axis = two_clouds()
    keep = np.flatnonzero(y > 0).tolist() + np.flatnonzero(y < 0)[:30].tolist()
    finder = PrincipalComponent(n_directions=3).fit(X[keep], y[keep])
    np.testing.assert_allclose(finder.directions_ @ finder.directions_.T, np.eye(3), atol=1e-4)
    assert finder.direction_ @ axis > 0.8


def test_the_probe_ignores_a_dimension_of_huge_variance():
    X, y, axis = two_clouds(n=1000)
    X[:, 7] *= 100
    assert abs(LogisticProbe().fit(X, y).direction_ @ axis) > 0.9


def test_settings_out_of_range():
    X, y, _ = two_clouds()
    with pytest.raises(ParameterError, match="inverse_strength=0"):
        LogisticProbe(inverse_strength=0).fit(X, y)
    with pytest.raises(ParameterError, match="n_directions=0"):
        PrincipalComponent(n_directions=0).fit(X, y)
