"""Whitened principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertsteer.pairing.projection import resolve_n_components, whiten_layers


@pytest.mark.parametrize("shape", [(100, 2, 30), (40, 2, 90), (400, 1, 500)])
def test_scores_are_centred_orthonormal_and_leading(shape):
    rng = np.random.default_rng(0)
    states = rng.standard_normal(shape) * 0.7 ** np.arange(shape[2]) + 100
    scores, ranks = whiten_layers("states", states, 8)
    assert scores.shape == (shape[1], shape[0], 8)
    assert ranks.tolist() == [8] * shape[1]
    for layer in range(shape[1]):
        torch.testing.assert_close(scores[layer].mT @ scores[layer], torch.eye(8).double())
        assert scores[layer].mean(dim=0).abs().max() < 1e-10
        centred = states[:, layer] - states[:, layer].mean(axis=0)
        leading = np.linalg.svd(centred, full_matrices=False)[0][:, :8]
        cosines = np.linalg.svd(leading.T @ scores[layer].numpy())[1]
        np.testing.assert_allclose(cosines, 1, atol=1e-4)


def test_columns_beyond_the_rank_are_zero():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((50, 2, 6))
    states[:, 1, 2:] = states[:, 1, :2] @ rng.standard_normal((2, 4))
    scores, ranks = whiten_layers("states", states, 10)
    assert scores.shape == (2, 50, 6)
    assert ranks.tolist() == [6, 2]
    assert (scores[1, :, 2:] == 0).all()


def test_half_precision_and_repeated_calls():
    states = torch.randn(300, 1, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    first, again = (whiten_layers("states", states, 5).scores for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize(("n_rows", "expected"), [(16, 2), (400, 50), (5000, 64)])
def test_default_number_of_components(n_rows, expected):
    assert resolve_n_components(None, n_rows) == expected
