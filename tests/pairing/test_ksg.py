"""Kraskov's estimator against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import digamma

from expertsteer.pairing.canonical import normal_scores
from expertsteer.pairing.ksg import ksg_pairs


@pytest.mark.parametrize("n_neighbors", [1, 3, 10])
def test_matches_the_formula(n_neighbors):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 80))
    left = normal_scores(torch.from_numpy(x), seed=0)
    right = normal_scores(torch.from_numpy(x + rng.standard_normal((2, 80))), seed=1)
    expected = []
    for a, b in zip(left.numpy(), right.numpy(), strict=True):
        across, along = abs(a[:, None] - a), abs(b[:, None] - b)
        radius = np.sort(np.maximum(across, along), axis=1)[:, n_neighbors, None]
        counts = [(distance < radius - 1e-12).sum(axis=1) - 1 for distance in (across, along)]
        local = digamma(counts[0] + 1) + digamma(counts[1] + 1)
        expected.append(digamma(n_neighbors) + digamma(80) - local.mean())
    np.testing.assert_allclose(ksg_pairs(left, right, n_neighbors), expected, rtol=1e-9)
