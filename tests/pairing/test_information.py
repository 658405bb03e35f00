"""The table of mutual information: accuracy on known cases, invariances, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertsteer.errors import DataError, ParameterError
from expertsteer.pairing import ESTIMATORS, mutual_information_table

N_ROWS = 2000
EVERY = tuple(ESTIMATORS)


def gaussian_states(seed, n_rows, expert_width, target_width, nats, spread=True):
    """Two layers of correlated Gaussians with a known information, in random bases."""
    rng = np.random.default_rng(seed)
    shared = min(expert_width, target_width)
    per_pair = np.full(shared, nats / shared) if spread else np.r_[nats, np.zeros(shared - 1)]
    rho = np.sqrt(-np.expm1(-2 * per_pair))
    expert = rng.standard_normal((n_rows, expert_width))
    target = rng.standard_normal((n_rows, target_width))
    target[:, :shared] = rho * expert[:, :shared] + np.sqrt(1 - rho**2) * target[:, :shared]
    expert = expert @ rng.standard_normal((expert_width, expert_width))
    target = target @ rng.standard_normal((target_width, target_width)) + 5
    return expert[:, None], target[:, None]


def random_table(seed=0, n_rows=400, widths=(6, 9), layers=(3, 2)):
    """States of two models that share three coordinates, stronger in later layers."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n_rows, 1, 3))

    def model(width, n_layers):
        states = rng.standard_normal((n_rows, n_layers, width))
        states[..., :3] += common * np.arange(n_layers)[None, :, None]
        return states

    return model(widths[0], layers[0]), model(widths[1], layers[1])


@pytest.mark.parametrize("estimator", EVERY)
@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("nats", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("widths", [(2, 2), (2, 20), (10, 10), (20, 20)])
def test_reads_known_information_of_gaussians(estimator, widths, nats, spread):
    states = gaussian_states(1, N_ROWS, widths[0], widths[1], nats, spread)
    estimate = mutual_information_table(*states, estimator)[0, 0]
    assert abs(estimate - nats) <= max(0.05, 0.1 * nats)


@pytest.mark.parametrize("estimator", EVERY)
@pytest.mark.parametrize("width", [2, 20])
def test_independent_states_read_near_zero(estimator, width):
    states = gaussian_states(2, N_ROWS, width, width, 0.0)
    assert abs(mutual_information_table(*states, estimator)[0, 0]) < 0.05


def test_bias_correction_is_exact_on_average():
    # Without it 12 x 10 components read 0.33 nats at 200 rows.
    readings = [
        mutual_information_table(*gaussian_states(seed, 200, 12, 10, 0.0))[0, 0]
        for seed in range(100)
    ]
    standard_error = np.std(readings) / 10
    assert standard_error < 0.01
    assert abs(np.mean(readings)) < 3 * standard_error


def test_wide_states_are_read_through_their_leading_components():
    rng = np.random.default_rng(0)
    shared = 30 * rng.standard_normal((600, 4))
    noise = 30 * rng.standard_normal((600, 4))
    rho = 0.8
    expert = shared @ rng.standard_normal((4, 700)) + 0.1 * rng.standard_normal((600, 700))
    mixed = rho * shared + np.sqrt(1 - rho**2) * noise
    target = mixed @ rng.standard_normal((4, 900)) + 0.1 * rng.standard_normal((600, 900))
    truth = -2 * np.log(1 - rho**2)
    few = mutual_information_table(expert[:, None], target[:, None], n_components=4)[0, 0]
    default = mutual_information_table(expert[:, None], target[:, None])[0, 0]
    assert few == pytest.approx(truth, rel=0.1)
    assert default == pytest.approx(truth, abs=0.3)


# Ties are broken by noise that differs between the sides, in all but the Gaussian estimator.
@pytest.mark.parametrize(
    ("estimator", "tolerance"), [("gaussian", 1e-9), ("ksg", 1e-3), ("kernel", 1e-4)]
)
def test_exchanging_the_models_transposes_the_table(estimator, tolerance):
    expert, target = random_table()
    table = mutual_information_table(expert, target, estimator)
    exchanged = mutual_information_table(target, expert, estimator)
    assert table.shape == (3, 2)
    np.testing.assert_allclose(table, exchanged.T, atol=tolerance)
    assert table[2, 1] > table[1, 1] > table[0, 0] + 0.1


@pytest.mark.parametrize("estimator", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_linear_maps_change_nothing(estimator, seed):
    expert, target = random_table(seed, layers=(2, 2))
    rng = np.random.default_rng(seed + 10)
    before = mutual_information_table(expert, target, estimator)
    mapped = expert @ rng.standard_normal((6, 6)) + rng.standard_normal(6)
    after = mutual_information_table(mapped, 1e3 * target @ rng.standard_normal((9, 9)), estimator)
    np.testing.assert_allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("estimator", EVERY)
def test_degenerate_columns_change_nothing(estimator):
    expert, target = random_table(layers=(2, 2))
    repeated = np.concatenate([expert, 3 * expert[..., :4], np.full((400, 2, 2), 7.0)], axis=-1)
    np.testing.assert_allclose(
        mutual_information_table(repeated, target, estimator),
        mutual_information_table(expert, target, estimator),
        atol=1e-3,
    )


@pytest.mark.parametrize("estimator", EVERY)
@pytest.mark.parametrize("width", [5, 600])
def test_constant_layer_reads_zero(estimator, width):
    rng = np.random.default_rng(0)
    expert = rng.standard_normal((300, 2, width))
    expert[:, 0] = rng.standard_normal(width) * 1e4
    target = rng.standard_normal((300, 2, 4))
    target[:, 1] = 0.1
    table = mutual_information_table(expert, target, estimator)
    assert (table[0] == 0).all()
    assert (table[:, 1] == 0).all()
    assert table[1, 0] != 0


@pytest.mark.parametrize("estimator", EVERY)
def test_model_of_constant_layers_reads_zero(estimator):
    expert, target = random_table(n_rows=64)
    table = mutual_information_table(expert, np.ones_like(target), estimator)
    assert (table == 0).all()


@pytest.mark.parametrize("estimator", EVERY)
def test_fewest_rows_allowed(estimator):
    table = mutual_information_table(*random_table(n_rows=16), estimator)
    assert np.isfinite(table).all()


@pytest.mark.parametrize("estimator", EVERY)
def test_a_model_with_itself_is_finite_and_large(estimator):
    expert, _ = random_table(n_rows=200)
    table = mutual_information_table(expert, expert, estimator)
    assert np.isfinite(table).all()
    assert (np.diag(table) > 10).all()


def test_huge_outlier_components_do_not_hide_the_others():
    # Language models have coordinates thousands of times larger than the rest.
    rng = np.random.default_rng(0)
    expert, target = (0.01 * rng.standard_normal((400, 1, 500)) for _ in range(2))
    common = rng.standard_normal((400, 1, 5))
    expert[..., :5] += common
    target[..., 10:15] += common
    plain = mutual_information_table(expert, target, n_components=6)
    expert[..., 100] = 2e4 * rng.standard_normal((400, 1))
    shifted = mutual_information_table(expert, target, n_components=6)
    assert plain[0, 0] > 10
    np.testing.assert_allclose(shifted, plain, rtol=0.05)


def test_dependence_without_correlation():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N_ROWS, 1, 1))
    y = x**2 + 0.3 * rng.standard_normal((N_ROWS, 1, 1))
    readings = {name: mutual_information_table(x, y, name)[0, 0] for name in EVERY}
    assert abs(readings["gaussian"]) < 0.05
    assert readings["ksg"] > 1
    assert readings["kernel"] > 0.5


@pytest.mark.parametrize(("estimator", "tolerance"), [("ksg", 0.03), ("kernel", 0.06)])
def test_heavy_tails_do_not_mislead_the_estimators_by_pairs(estimator, tolerance):
    # Cauchy pairs share their scale; the truth is that of a bivariate t with one degree of
    # freedom and no correlation, 0.224 nats.
    rng = np.random.default_rng(0)
    scale = 1 / np.abs(rng.standard_normal((N_ROWS, 1, 1)))
    x, y = (scale * rng.standard_normal((N_ROWS, 1, 1)) for _ in range(2))
    assert mutual_information_table(x, y, estimator)[0, 0] == pytest.approx(0.224, abs=tolerance)
    assert abs(mutual_information_table(x, y)[0, 0] - 0.224) > tolerance


def test_clusters_shared_by_all_rows_are_not_broken_in_row_order():
    # Ties in both models at once, but otherwise independent: one cluster each, one odd row.
    rng = np.random.default_rng(0)
    x, y = np.zeros((2, 500, 1, 1))
    x[:100, 0, 0] = rng.standard_normal(100)
    y[400:, 0, 0] = rng.standard_normal(100)
    for estimator in ("ksg", "kernel"):
        assert mutual_information_table(x, y, estimator)[0, 0] < 0.5


def test_kinds_of_array():
    expert, target = random_table(n_rows=64)
    tables = [
        mutual_information_table(kind(expert), kind(target))
        for kind in (np.asarray, torch.as_tensor)
    ]
    assert isinstance(tables[0], np.ndarray)
    assert isinstance(tables[1], torch.Tensor)
    assert tables[0].dtype == np.float64
    assert tables[1].dtype == torch.float64
    np.testing.assert_array_equal(tables[0], tables[1].numpy())


def test_states_are_left_as_they_were():
    expert, target = (states.astype(np.float32) for states in random_table(n_rows=64))
    copies = expert.copy(), target.copy()
    mutual_information_table(expert, target, "ksg")
    np.testing.assert_array_equal(expert, copies[0])
    np.testing.assert_array_equal(target, copies[1])


def test_progress_counts_pairs_of_layers():
    seen = []
    expert, target = random_table(n_rows=64)
    mutual_information_table(expert, target, progress=lambda *call: seen.append(call))
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_unknown_estimator_lists_the_options():
    with pytest.raises(ParameterError, match=r"'mine'.*gaussian, ksg, kernel"):
        mutual_information_table(*random_table(), "mine")


def test_rows_must_match():
    expert, target = random_table()
    with pytest.raises(DataError, match="400 rows of expert_states and 399"):
        mutual_information_table(expert, target[:-1])


def test_states_must_have_three_dimensions():
    expert, target = random_table()
    with pytest.raises(DataError, match=r"target_states with shape \(400, 9\)"):
        mutual_information_table(expert, target[:, 0])


def test_too_few_rows():
    expert, target = random_table(n_rows=15)
    with pytest.raises(DataError, match="15 rows, but expected at least 16"):
        mutual_information_table(expert, target)


def test_not_finite_names_the_layer():
    expert, target = random_table()
    expert[3, 2, 1] = np.nan
    with pytest.raises(DataError, match=r"expert_states\[:, 2\].*1 of 400 rows"):
        mutual_information_table(expert, target)


@pytest.mark.parametrize("n_components", [0, 101, 2.5, True])
def test_components_out_of_range(n_components):
    with pytest.raises(ParameterError, match=r"n_components=.*from 1 to 100"):
        mutual_information_table(*random_table(), n_components=n_components)


@pytest.mark.parametrize("n_neighbors", [0, 400, 1.5])
def test_neighbours_out_of_range(n_neighbors):
    with pytest.raises(ParameterError, match=r"n_neighbors=.*from 1 to 399"):
        mutual_information_table(*random_table(), "ksg", n_neighbors=n_neighbors)
