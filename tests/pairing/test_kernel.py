"""The kernel estimate against the same sum without a grid."""

from __future__ import annotations

import math

import numpy as np
import torch

from expertsteer.pairing.canonical import normal_scores
from expertsteer.pairing.kernel import kernel_pairs


def test_grid_agrees_with_the_sum_over_rows():
    rng = np.random.default_rng(0)
    n_rows = 300
    x = rng.standard_normal((2, n_rows))
    left = normal_scores(torch.from_numpy(x), seed=0)
    right = normal_scores(torch.from_numpy(x**2 + x + rng.standard_normal(x.shape)), seed=1)
    expected = []
    for a, b in zip(left.numpy(), right.numpy(), strict=True):
        rho = a @ b / (a @ a)
        covariance = np.array([[1, rho], [rho, 1]]) * n_rows ** (-1 / 3)
        steps = np.stack([a[:, None] - a, b[:, None] - b], axis=-1)
        exponent = np.einsum("ijk,kl,ijl->ij", steps, np.linalg.inv(covariance), steps)
        norm = 2 * math.pi * math.sqrt(np.linalg.det(covariance))
        density = np.exp(-exponent / 2).mean(axis=1) / norm
        expected.append(math.log(2 * math.pi * math.e) + np.log(density).mean())
    np.testing.assert_allclose(kernel_pairs(left, right), expected, atol=0.02)
