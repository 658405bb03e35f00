"""The recursive feature machine against its definition, its oracle, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertsteer.directions import (
    LogisticProbe,
    MeanDifference,
    PrincipalComponent,
    RecursiveFeatureMachine,
    auc,
    recursive_feature_machine,
    search_bandwidth,
)
from expertsteer.errors import DataError, ParameterError


def published(bandwidth=10.0, **settings):
    """Return a machine with the settings the paper and xrfm share."""
    return RecursiveFeatureMachine(
        bandwidth=bandwidth, bandwidth_mode="constant", ridge=1e-3, **settings
    )


def problem(n=100, d=30, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=d) / np.sqrt(d)
    X = rng.normal(size=(n, d)).astype("float32")
    y = np.where(X @ axis + noise * rng.normal(size=n) > 0, 1, -1)
    return X, y, axis / np.linalg.norm(axis)


def by_definition(X, y, bandwidth, ridge, n_iterations):
    """METHOD as written: d x d matrices, explicit gradients, double precision."""
    X = X.astype("float64")
    targets = y - y.mean()
    n, d = X.shape
    M = np.eye(d)
    for _ in range(n_iterations):
        difference = X[:, None] - X[None]
        distance = np.sqrt(np.maximum(np.einsum("ijk,kl,ijl->ij", difference, M, difference), 0))
        kernel = np.exp(-distance / bandwidth)
        alpha = np.linalg.solve(kernel + ridge * np.eye(n), targets)
        with np.errstate(divide="ignore", invalid="ignore"):
            pull = np.where(distance < 1e-10, 0, alpha * kernel / distance / bandwidth)
        gradients = np.einsum("ki,kij->kj", pull, -difference) @ M
        M = gradients.T @ gradients / n
        M = M / M.max()
    values, vectors = np.linalg.eigh(M)
    return vectors[:, -1], values[::-1]


@pytest.mark.parametrize(("n", "d"), [(60, 20), (25, 40)])
@pytest.mark.parametrize("bandwidth", [1.0, 10.0])
def test_the_low_rank_form_is_the_definition(n, d, bandwidth):
    X, y, _ = problem(n, d)
    rfm = published(bandwidth, n_iterations=4, n_directions=3).fit(X, y)
    direction, values = by_definition(X, y, bandwidth, 1e-3, 4)
    assert abs(direction @ rfm.direction_) > 0.9999
    np.testing.assert_allclose(rfm.eigenvalues_, values[:3], rtol=1e-2, atol=1e-4)


def test_against_xrfm():
    xrfm = pytest.importorskip("xrfm")
    X, y, _ = problem(n=256, d=1024)
    ours = published(n_iterations=5).fit(X, y)
    labels = torch.from_numpy(y - y.mean()).float()[:, None]
    oracle = xrfm.rfm_src.RFM(
        kernel="l2_high_dim", bandwidth=10.0, iters=5, device="cpu", verbose=False
    )
    states = torch.from_numpy(X)
    oracle.fit(
        (states, labels),
        (states[:32], labels[:32]),
        iters=5,
        method="cholesky",
        reg=1e-3,
        get_agop_best_model=True,
        return_best_params=False,
        early_stop_rfm=False,
    )
    metric = oracle.agop_best_model
    direction = torch.linalg.eigh(metric.float())[1][:, -1].numpy()
    assert abs(direction @ ours.direction_) > 0.999


def test_direction_is_found_oriented_and_of_unit_length():
    X, y, axis = problem(n=400)
    rfm = RecursiveFeatureMachine(ridge=1e-3, n_directions=4).fit(X, y)
    assert rfm.direction_ @ axis > 0.9
    flipped = RecursiveFeatureMachine().fit(X, -y)
    assert flipped.direction_ @ axis < -0.9
    np.testing.assert_allclose(np.linalg.norm(rfm.directions_, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(rfm.directions_ @ rfm.directions_.T, np.eye(4), atol=1e-3)
    np.testing.assert_array_equal(rfm.direction_, rfm.directions_[0])
    assert list(rfm.eigenvalues_) == sorted(rfm.eigenvalues_, reverse=True)


def test_directions_that_the_metric_has_lost_are_left_out():
    X, y, _ = problem(n=400)
    few = RecursiveFeatureMachine(n_directions=4).fit(X, y)
    assert few.directions_.shape == (1, 30)
    assert few.eigenvalues_.shape == (1,)
    alone = RecursiveFeatureMachine().fit(X, y)
    np.testing.assert_allclose(few.direction_, alone.direction_, atol=1e-6)


def test_predict_ranks_new_states_and_interpolates_the_old():
    X, y, _ = problem(n=300, noise=0.0)
    rfm = published().fit(X[:200], y[:200])
    assert auc(rfm, X[200:], y[200:]) > 0.9
    np.testing.assert_allclose(rfm.predict(X[:200]), y[:200], atol=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_wrong_labels_mislead_the_default_less_than_the_published_ridge(seed):
    # States as models have them: a few directions carry most of the variance.
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, 401) ** -0.5
    axis = rng.normal(size=400) * spectrum
    axis /= np.linalg.norm(axis)
    y = rng.choice([-1, 1], 200)
    X = (rng.normal(size=(200, 400)) * spectrum + y[:, None] * axis).astype("float32")
    wrong = rng.permutation(200) < 40
    for labels, gained in ((y, 0.05), (np.where(wrong, -y, y), 0.2)):
        default, small = (
            RecursiveFeatureMachine(**settings).fit(X, labels).direction_ @ axis
            for settings in ({}, {"ridge": 1e-3})
        )
        assert default > small + gained


def test_a_shift_of_the_states_changes_nothing():
    X, y, _ = problem()
    here = RecursiveFeatureMachine().fit(X, y).direction_
    there = RecursiveFeatureMachine().fit(X + 1000, y).direction_
    assert here @ there > 0.999


def test_an_adaptive_bandwidth_makes_scale_irrelevant():
    X, y, _ = problem()
    rfm = RecursiveFeatureMachine(bandwidth=1.0, bandwidth_mode="adaptive")
    small, large = (rfm.unfitted().fit(X * s, y).direction_ for s in (1e-2, 1e4))
    assert small @ large > 0.999


def test_no_matrix_of_width_by_width():
    # 20,000 x 20,000 floats are 1.6 GB; twenty rows of that width are 1.6 MB.
    X, y, _ = problem(n=20, d=20_000)
    tracked = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                tracked.append(result.numel())
            return result

    with Watch():
        RecursiveFeatureMachine().fit(torch.from_numpy(X), torch.from_numpy(y))
    assert max(tracked) <= 20 * 20_000


def test_numpy_and_torch_agree_and_keep_their_kind():
    X, y, _ = problem()
    from_numpy = RecursiveFeatureMachine().fit(X, y)
    from_torch = RecursiveFeatureMachine().fit(torch.from_numpy(X), torch.from_numpy(y))
    assert isinstance(from_numpy.direction_, np.ndarray)
    assert isinstance(from_torch.direction_, torch.Tensor)
    np.testing.assert_array_equal(from_numpy.direction_, from_torch.direction_.numpy())


def test_duplicate_rows_exert_no_gradient_on_each_other():
    X, y, axis = problem()
    twice = RecursiveFeatureMachine().fit(np.vstack([X, X]), np.concatenate([y, y]))
    assert np.isfinite(twice.direction_).all()
    assert twice.direction_ @ axis > 0.5


@pytest.mark.parametrize("mode", ["constant", "adaptive"])
def test_layers_are_fitted_as_they_are_alone(mode, monkeypatch):
    problems = [problem(seed=seed) for seed in range(3)]
    X = torch.stack([torch.from_numpy(x) for x, _, _ in problems], 1)
    y = problems[0][1]
    settings = RecursiveFeatureMachine(bandwidth_mode=mode, ridge=1e-3, n_directions=2)
    alone = [settings.unfitted().fit(X[:, layer], y) for layer in range(3)]
    for at_once in (1, 2, 3):  # as a GPU would be given them
        monkeypatch.setattr(recursive_feature_machine, "_layers_at_once", lambda *_, n=at_once: n)
        for one, other in zip(alone, settings.fit_layers(X, y), strict=True):
            torch.testing.assert_close(one.directions_, other.directions_, atol=1e-5, rtol=1e-4)
            np.testing.assert_allclose(one.eigenvalues_, other.eigenvalues_, rtol=1e-5)
            layer = alone.index(one)
            torch.testing.assert_close(
                one.predict(X[:, layer]), other.predict(X[:, layer]), atol=1e-5, rtol=1e-4
            )


def test_a_layer_without_gradient_does_not_cost_the_others():
    X, y, _ = problem()
    layers = np.stack([X * 1e7, X], 1)
    (far, _), (near, scores) = published().search_layers(
        layers, y, (1.0, 1e8), lambda _layer, machine: -machine.bandwidth
    )
    assert (far.bandwidth, near.bandwidth) == (1e8, 1.0)
    assert scores == {1.0: -1.0, 1e8: -1e8}
    with pytest.raises(DataError, match=r"bandwidth=1\.0 leaves no gradient"):
        published(1.0).fit_layers(layers, y)
    np.testing.assert_array_equal(near.direction_, published(1.0).fit(X, y).direction_)


def test_every_finder_fits_layers():
    X, y, _ = problem()
    layers = np.stack([X, -X], 1)
    for finder in (MeanDifference(), LogisticProbe(), PrincipalComponent()):
        first, second = finder.fit_layers(layers, y)
        np.testing.assert_array_equal(first.direction_, finder.fit(X, y).direction_)
        np.testing.assert_array_equal(second.direction_, finder.fit(-X, y).direction_)
    layers[:, 1] = 1
    for finder in (MeanDifference(), RecursiveFeatureMachine()):
        with pytest.raises(DataError, match="rows are all equal"):
            finder.fit_layers(layers, y)
        with pytest.raises(DataError, match="expected 3 dimensions"):
            finder.fit_layers(X, y)


def test_the_search_keeps_the_best_bandwidth_of_each_layer():
    X, y, _ = problem(n=200)
    layers = np.stack([X, 1e5 * X], 1)
    found = search_bandwidth(
        layers[:120], y[:120], layers[120:], y[120:], bandwidths=(0.3, 10.0, 1e6), rfm=published()
    )
    assert len(found) == 2
    for layer, (rfm, scores) in enumerate(found):
        assert rfm.bandwidth == max(scores, key=scores.get)
        assert auc(rfm, layers[120:, layer], y[120:]) == scores[rfm.bandwidth]
    assert set(found[0][1]) == {0.3, 10.0, 1e6}
    assert set(found[1][1]) == {1e6}


def test_the_search_skips_a_bandwidth_without_gradient():
    X, y, _ = problem(n=200)
    far = X[:, None] * 1e7
    ((rfm, scores),) = search_bandwidth(
        far[:120], y[:120], far[120:], y[120:], bandwidths=(1.0, 1e8), rfm=published()
    )
    assert set(scores) == {1e8}
    assert rfm.bandwidth == 1e8
    with pytest.raises(DataError, match=r"bandwidth=1\.0 leaves no gradient"):
        search_bandwidth(far[:120], y[:120], far[120:], y[120:], bandwidths=(1.0,), rfm=published())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bandwidth": 0}, "bandwidth=0"),
        ({"bandwidth": float("inf")}, "bandwidth=inf"),
        ({"ridge": -1}, "ridge=-1"),
        ({"n_iterations": 0}, "n_iterations=0"),
        ({"n_directions": 0}, "n_directions=0"),
        ({"bandwidth_mode": "auto"}, "bandwidth_mode='auto'"),
    ],
)
def test_settings_out_of_range(settings, message):
    X, y, _ = problem()
    with pytest.raises(ParameterError, match=message):
        RecursiveFeatureMachine(**settings).fit(X, y)


def test_unusable_states_and_labels():
    X, y, _ = problem()
    fit = RecursiveFeatureMachine().fit
    with pytest.raises(DataError, match="only the label"):
        fit(X, np.ones(100))
    with pytest.raises(DataError, match="values 0, 1"):
        fit(X, (y + 1) // 2)
    with pytest.raises(DataError, match="99 labels"):
        fit(X, y[:99])
    with pytest.raises(DataError, match="all equal"):
        fit(np.ones((100, 4)), y)
    broken = X.copy()
    broken[0, 0] = np.inf
    with pytest.raises(DataError, match="NaN or infinite"):
        fit(broken, y)
