"""Alignments on arrays whose answer is known."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from expertsteer.alignment import (
    ALIGNERS,
    CCA,
    AlignedAutoEncoder,
    AutoEncoder,
    Procrustes,
    Ridge,
    autoencoder,
)
from expertsteer.alignment.linear import (
    between_bases,
    leave_one_out_ridge,
    ridge_solution,
    thin_svd,
)
from expertsteer.errors import DataError, ParameterError


def paired(n=120, d_expert=16, d_target=12, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    expert = rng.normal(size=(n, d_expert)).astype("float32") + 3
    mixing = rng.normal(size=(d_expert, d_target))
    target = expert @ mixing + 5 + noise * rng.normal(size=(n, d_target))
    return expert, target.astype("float32")


FITTED_TO_TARGET = [Ridge(), CCA(ridge=1e-6), AlignedAutoEncoder(weight=100.0)]


@pytest.mark.parametrize("aligner", FITTED_TO_TARGET, ids=lambda a: type(a).__name__)
def test_a_linear_relation_is_found(aligner):
    expert, target = paired()
    fitted = aligner.unfitted().fit(expert[:100], target[:100])
    assert fitted.r2_ > 0.99
    np.testing.assert_allclose(fitted.encode(expert[100:]), target[100:], atol=0.7)
    assert fitted.r2(expert[100:], target[100:]) > 0.99


@pytest.mark.parametrize("n", [40, 400])
def test_ridge_agrees_with_the_textbook_in_both_shapes(n):
    expert, target = paired(n=n, d_expert=100, noise=1.0)
    ridge = Ridge(ridge=0.1).fit(expert, target)
    x, y = expert - expert.mean(0), target - target.mean(0)
    rank = min(n - 1, 100)
    scale = np.linalg.svd(x, compute_uv=False)[:rank] ** 2
    expected = np.linalg.solve(x.T @ x + 0.1 * scale.mean() * np.eye(100), x.T @ y)
    np.testing.assert_allclose(ridge.encoder_weight_, expected, rtol=1e-3, atol=1e-4)


def test_ridge_strength_follows_the_noise():
    clean = Ridge().fit(*paired(n=60, d_expert=50)).ridge_
    noisy = Ridge().fit(*paired(n=60, d_expert=50, noise=50.0)).ridge_
    assert clean < noisy


def test_leave_one_out_is_exact():
    expert, target = (torch.from_numpy(a) for a in paired(n=30, d_expert=40, noise=2.0))
    grid = (1e-3, 1e-1, 10.0)
    scale = thin_svd(expert).s.square().mean()
    errors = []
    for ridge in grid:
        total = 0.0
        for row in range(30):
            rest = torch.arange(30) != row
            x, y = thin_svd(expert[rest]), thin_svd(target[rest])
            # The same absolute strength, whatever rows are left.
            strength = float(ridge * scale / x.s.square().mean())
            solution = between_bases(x, ridge_solution(x, y.coordinates(), strength), y)
            total += float((solution(expert[row]) - target[row]).square().sum())
        errors.append(total)
    assert leave_one_out_ridge(thin_svd(expert), target, grid) == grid[int(np.argmin(errors))]


def test_procrustes_undoes_a_rotation():
    rng = np.random.default_rng(0)
    expert = rng.normal(size=(200, 10)).astype("float32")
    rotation = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    target = (2.5 * expert @ rotation + 1).astype("float32")
    fitted = Procrustes().fit(expert, target)
    np.testing.assert_allclose(fitted.encoder_weight_, 2.5 * rotation, atol=1e-3)
    assert fitted.r2_ > 0.999


@pytest.mark.parametrize(("d_expert", "d_target"), [(20, 8), (8, 20)])
def test_procrustes_is_semi_orthogonal_when_widths_differ(d_expert, d_target):
    expert, target = paired(d_expert=d_expert, d_target=d_target)
    weight = Procrustes().fit(expert, target).encoder_weight_
    gram = weight @ weight.T if d_expert < d_target else weight.T @ weight
    np.testing.assert_allclose(gram / gram[0, 0], np.eye(len(gram)), atol=1e-3)


def test_cca_correlations_of_unrelated_states_are_small():
    rng = np.random.default_rng(0)
    expert, target = rng.normal(size=(2, 2000, 5)).astype("float32")
    assert float(CCA().fit(expert, target).correlations_.max()) < 0.15


def test_the_closed_form_auto_encoder_is_the_principal_subspace():
    expert, _ = paired(n=300, d_expert=20, noise=0.0)
    fitted = AutoEncoder().fit(expert, target_width=6)
    centred = expert - expert.mean(0)
    s = np.linalg.svd(centred, compute_uv=False)
    error = np.square(expert - fitted.decode(fitted.encode(expert))).sum()
    np.testing.assert_allclose(error, (s[6:] ** 2).sum(), rtol=1e-3)
    assert fitted.loss_ == pytest.approx((s[6:] ** 2).sum() / (s**2).sum(), rel=1e-3)


def test_the_gradient_auto_encoder_reaches_the_closed_form():
    rng = np.random.default_rng(0)
    expert = (rng.normal(size=(100, 4)) @ rng.normal(size=(4, 12))).astype("float32")
    gradient = AutoEncoder(solver="gradient", n_steps=800, learning_rate=1e-2)
    gradient.fit(expert, target_width=3)
    exact = AutoEncoder().fit(expert, target_width=3)
    assert gradient.loss_ == pytest.approx(exact.loss_, rel=0.05)


def test_the_auto_encoder_never_sees_the_target():
    expert, target = paired()
    blind = AutoEncoder().fit(expert, target_width=12)
    shown = AutoEncoder().fit(expert, target)
    np.testing.assert_array_equal(blind.encoder_weight_, shown.encoder_weight_)
    assert np.isnan(blind.r2_)
    assert np.isfinite(shown.r2_)


@pytest.mark.parametrize("solver", ["closed_form", "gradient"])
def test_the_auto_encoders_basis_is_the_seeds(solver):
    expert, _ = paired()
    weights = [
        AutoEncoder(solver=solver, n_steps=300, random_state=seed)
        .fit(expert, target_width=12)
        .encoder_weight_
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[0] - weights[2]).max() > 0.01


def test_the_aligned_auto_encoder_runs_between_paper_and_ridge():
    # Nothing in the target but the expert's first coordinate: the two terms pull apart.
    rng = np.random.default_rng(0)
    expert = rng.normal(size=(400, 8)).astype("float32")
    target = np.outer(expert[:, 0], np.ones(4)).astype("float32")
    target += 0.5 * rng.normal(size=target.shape).astype("float32")
    fits = [AlignedAutoEncoder(weight=w).fit(expert, target) for w in (0.0, 0.1, 1.0, 1000.0)]
    r2 = [fit.r2_ for fit in fits]
    errors = [fit.reconstruction_error_ for fit in fits]
    assert r2[0] < 0 < r2[1]
    assert r2[1] < r2[3] + 0.005
    assert errors[0] <= errors[1] + 0.01
    assert errors[1] < errors[3]
    ridge = Ridge().fit(expert, target)
    assert r2[3] == pytest.approx(ridge.r2_, abs=0.01)
    paper = AutoEncoder().fit(expert, target)
    np.testing.assert_array_equal(fits[0].encoder_weight_, paper.encoder_weight_)


def test_the_aligned_solution_is_a_stationary_point_of_its_loss():
    expert, target = (torch.from_numpy(a).double() for a in paired(n=200, noise=3.0))
    fitted = AlignedAutoEncoder(weight=2.0, n_iterations=200, ridge=0.0).fit(
        expert.float(), target.float()
    )
    x, y = expert - expert.mean(0), target - target.mean(0)

    def loss(weight):
        z = x @ weight
        decoder = torch.linalg.lstsq(z, x).solution
        recon = (x - z @ decoder).square().sum() / x.square().sum()
        return recon + 2.0 * (z - y).square().sum() / y.square().sum()

    best = loss(fitted.encoder_weight_.double())
    assert float(best) == pytest.approx(fitted.loss_, rel=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = torch.randn(16, 12, generator=generator, dtype=torch.float64) * 0.02
        assert loss(fitted.encoder_weight_.double() + step) > best - 1e-5


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_no_round_of_the_alternation_raises_the_regularised_loss(ridge):
    expert, target = paired(n=200, noise=3.0)
    x, y = (torch.from_numpy(a - a.mean(0)).double() for a in (expert, target))
    damping = ridge * x.square().sum() / len(torch.linalg.svdvals(x))

    def loss(n_iterations):
        fitted = AlignedAutoEncoder(weight=2.0, n_iterations=n_iterations, ridge=ridge)
        w = torch.from_numpy(fitted.fit(expert, target).encoder_weight_).double()
        # The way back that is best for this encoder under the same damping.
        gram = x.T @ x + damping * torch.eye(x.shape[1], dtype=torch.float64)
        d = torch.linalg.solve(w.T @ gram @ w, w.T @ x.T @ x)
        first = (x - x @ w @ d).square().sum() + damping * (w @ d).square().sum()
        second = (x @ w - y).square().sum() + damping * w.square().sum()
        return float(first / x.square().sum() + 2.0 * second / y.square().sum())

    losses = [loss(n) for n in (1, 2, 3, 5, 10, 30)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] * (1 + 1e-6)


def test_the_weight_decides_nothing_where_the_target_has_room_for_the_expert():
    # As many directions there as here: any invertible encoder has a perfect way back.
    expert, target = paired(n=200, d_expert=12, d_target=12, noise=3.0)
    ridge = Ridge(ridge=0.1).fit(expert, target).encoder_weight_
    for weight in (0.1, 10.0):
        fitted = AlignedAutoEncoder(weight=weight, ridge=0.1).fit(expert, target)
        np.testing.assert_allclose(fitted.encoder_weight_, ridge, atol=1e-5)


@pytest.mark.parametrize("name", ALIGNERS)
@pytest.mark.parametrize("side", ["expert", "target"])
def test_states_that_never_change_have_an_alignment(name, side):
    expert, target = paired(n=40)
    constant = np.full_like(expert if side == "expert" else target, 2.0)
    expert, target = (constant, target) if side == "expert" else (expert, constant)
    fitted = ALIGNERS[name]().fit(expert, target)
    assert np.isfinite(fitted.encode(expert)).all()
    assert np.isfinite(fitted.decode(fitted.encode(expert))).all()


@pytest.mark.parametrize("name", ALIGNERS)
def test_a_decoder_follows_its_fit(name):
    fitted = ALIGNERS[name]().fit(*paired(seed=1))
    first = fitted.decoder_weight_
    again = pickle.loads(pickle.dumps(fitted.fit(*paired(seed=2))))
    expected = ALIGNERS[name]().fit(*paired(seed=2)).decoder_weight_
    np.testing.assert_array_equal(again.decoder_weight_, expected)
    assert not np.array_equal(first, expected)


@pytest.mark.parametrize("name", ALIGNERS)
def test_every_alignment_has_the_same_face(name):
    expert, target = paired()
    kind = ALIGNERS[name]
    fitted = kind().fit(expert, target)
    for attribute, shape in {
        "encoder_weight_": (16, 12),
        "encoder_bias_": (12,),
        "decoder_weight_": (12, 16),
        "decoder_bias_": (16,),
    }.items():
        value = getattr(fitted, attribute)
        assert isinstance(value, np.ndarray)
        assert value.shape == shape
        assert value.dtype == np.float32
    encoded = fitted.encode(expert)
    assert encoded.shape == (120, 12)
    assert fitted.decode(encoded).shape == (120, 16)
    assert np.isfinite(fitted.reconstruction_error_)
    # A direction is carried by the linear part alone.
    direction = np.eye(16, dtype="float32")[2]
    moved = fitted.encode(expert + direction) - fitted.encode(expert)
    np.testing.assert_allclose(
        moved, np.tile(fitted.encode_direction(direction), (120, 1)), atol=1e-2
    )
    assert kind(**fitted.get_params()).get_params() == fitted.get_params()


@pytest.mark.parametrize("name", ALIGNERS)
def test_tensors_in_tensors_out(name):
    expert, target = (torch.from_numpy(a) for a in paired())
    fitted = ALIGNERS[name]().fit(expert, target)
    assert isinstance(fitted.encode(expert), torch.Tensor)
    assert isinstance(fitted.encoder_weight_, torch.Tensor)


def test_fewer_rows_than_dimensions():
    expert, target = paired(n=20, d_expert=300, d_target=200)
    for kind in ALIGNERS.values():
        fitted = kind().fit(expert, target)
        assert np.isfinite(fitted.encode(expert)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ridge(ridge=-1.0), "ridge=-1.0"),
        (lambda: Ridge(ridge=float("nan")), "ridge=nan"),
        (lambda: CCA(n_components=0), "n_components=0"),
        (lambda: AutoEncoder(solver="magic"), "solver='magic'"),
        (lambda: AutoEncoder(n_steps=0), "n_steps=0"),
        (lambda: AutoEncoder(learning_rate=0), "learning_rate=0"),
        (lambda: AlignedAutoEncoder(weight=-0.1), "weight=-0.1"),
        (lambda: AlignedAutoEncoder(n_iterations=0), "n_iterations=0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ParameterError, match=message.replace("(", r"\(")):
        make().fit(*paired())


def test_unusable_states():
    expert, target = paired()
    broken = expert.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="NaN or infinite values in 1 of 120 rows"):
        Ridge().fit(broken, target)
    with pytest.raises(DataError, match="120 expert states and 119 target states"):
        Ridge().fit(expert, target[:119])
    with pytest.raises(DataError, match="no target states"):
        Ridge().fit(expert)
    with pytest.raises(DataError, match="2 dimensions"):
        Ridge().fit(expert[None], target)
    with pytest.raises(DataError, match="at least 5"):
        Ridge().fit(expert[:4], target[:4])
    with pytest.raises(DataError, match="width 15, but expected 16"):
        Ridge().fit(expert, target).encode(expert[:, :15])
    with pytest.raises(ParameterError, match="target_width"):
        AutoEncoder().fit(expert)


# A target that spans all rows needs no round; of one that spans those of the expert, one tells.
@pytest.mark.parametrize(("width", "rank", "rounds"), [(40, 30, 0), (40, 20, 1), (6, 30, 10)])
def test_the_alternation_ends_where_nothing_is_left_to_lower(monkeypatch, width, rank, rounds):
    rng = np.random.default_rng(5)
    within = rng.normal(size=(30, rank))
    expert = (within @ rng.normal(size=(rank, 50))).astype("float32")
    target = (within @ rng.normal(size=(rank, width))).astype("float32")
    calls = []
    original = autoencoder._way_back
    monkeypatch.setattr(
        autoencoder, "_way_back", lambda *given: calls.append(given) or original(*given)
    )
    aligner = AlignedAutoEncoder(weight=1.0)
    sides = [thin_svd(torch.from_numpy(states)) for states in (expert, target)]
    aligner._solve(*sides)
    assert len(calls) == rounds
    # What further rounds would have found.
    monkeypatch.setattr(autoencoder, "_REACHED", 0.0)
    whole = AlignedAutoEncoder(weight=1.0)
    whole._solve(*sides)
    assert len(calls) == rounds + 10
    assert aligner.loss_ == pytest.approx(whole.loss_, rel=1e-6)


@pytest.mark.parametrize("rank", [29, 12])
@pytest.mark.parametrize("decay", [1.0, 2.0])
def test_the_way_back_lacks_no_more_than_it_is_trusted_to(monkeypatch, rank, decay):
    rng = np.random.default_rng(7)
    target = torch.from_numpy(rng.normal(size=(30, 40)) * 10.0 ** -np.linspace(0, decay, 40))
    expert = torch.from_numpy(rng.normal(size=(30, rank)) * 10.0 ** -np.linspace(0, decay, rank))
    # So large that what it takes is not lost in rounding.
    monkeypatch.setattr(autoencoder, "_DECODER_RIDGE", 1e-4)
    x, y = thin_svd(expert), thin_svd(target)
    gram = x.s.square()[:, None]
    damped = gram + 1e-2 * gram.mean()
    within = x.u.T @ y.coordinates()
    encoder = x.s[:, None] * within / damped
    back = encoder @ autoencoder._way_back(encoder.T @ (damped * encoder), (gram * encoder).T)
    lacking = (gram * (back - (gram / damped).flatten().diag()).square()).sum() / gram.sum()
    trusted = []
    for reached in 10.0 ** np.arange(-16.0, 6.0, 0.5):
        monkeypatch.setattr(autoencoder, "_REACHED", reached)
        if autoencoder._can_go_back(x, y, damped, within):
            trusted.append(reached)
    assert 1e-16 < lacking <= trusted[0]
