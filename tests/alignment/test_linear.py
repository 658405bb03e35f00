"""The closed forms behind the alignments, against what they stand for."""

import pytest
import torch

from expertsteer.affine import Affine
from expertsteer.alignment.linear import (
    leave_one_out_ridge,
    ridge_solution,
    thin_svd,
)


def regression(n, d_in, d_out, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d_in, generator=generator)
    weight = torch.randn(d_in, d_out, generator=generator)
    return inputs, inputs @ weight + noise * torch.randn(n, d_out, generator=generator)


def error_without_each(inputs, outputs, strength):
    total = 0.0
    for row in range(len(inputs)):
        others = torch.arange(len(inputs)) != row
        x, y = inputs[others].double(), outputs[others].double()
        centred = x - x.mean(0)
        gram = centred.T @ centred
        gram.diagonal().add_(strength)
        weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
        found = (inputs[row].double() - x.mean(0)) @ weight + y.mean(0)
        total += float((found - outputs[row]).square().sum())
    return total


@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "noise"),
    [(40, 8, 5, 0.0), (40, 8, 60, 3.0), (20, 50, 7, 0.5), (20, 50, 90, 40.0)],
)
def test_the_strength_chosen_is_best_when_each_row_is_left_out(n, d_in, d_out, noise):
    inputs, outputs = regression(n, d_in, d_out, noise)
    svd = thin_svd(inputs)
    grid = (1e-4, 1e-2, 1.0, 100.0)
    # The strengths are relative to the singular values of all rows, in both.
    scale = float(svd.s.square().mean())
    errors = {ridge: error_without_each(inputs, outputs, ridge * scale) for ridge in grid}
    assert leave_one_out_ridge(svd, outputs, grid) == min(grid, key=errors.__getitem__)


def test_a_rotation_of_the_outputs_changes_no_choice():
    inputs, outputs = regression(30, 10, 12, 2.0)
    rotated = outputs @ torch.linalg.qr(torch.randn(12, 12))[0]
    svd = thin_svd(inputs)
    assert leave_one_out_ridge(svd, outputs) == leave_one_out_ridge(svd, rotated)


def test_ridge_solution_solves_the_normal_equations():
    inputs, outputs = regression(30, 50, 12, 1.0)
    svd = thin_svd(inputs)
    aimed = (outputs - outputs.mean(0)).double()
    weight = svd.v @ ridge_solution(svd, aimed, 0.1)
    centred = (inputs - inputs.mean(0)).double()
    gram = centred.T @ centred
    gram.diagonal().add_(0.1 * svd.s.square().mean())
    expected = torch.linalg.solve(gram, centred.T @ aimed)
    torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [20, 35, 50])
def test_a_chain_of_maps_is_the_map_of_its_weight_and_bias(n):
    x, y = (thin_svd(regression(n, d, 3, 0.1)[0]) for d in (30, 40))
    first = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    core = torch.randn(len(x.s), len(y.s), dtype=torch.float64)
    shift = torch.randn(30, dtype=torch.float64)
    chain = Affine((first,), shift).then(x.to_coordinates()).then(y.from_coordinates(core))
    expected = first @ x.v @ core @ y.v.T
    torch.testing.assert_close(chain.weight, expected.float(), atol=1e-5, rtol=1e-4)
    states = torch.randn(5, 30)
    whole = states.double() @ expected + (shift - x.mean) @ x.v @ core @ y.v.T + y.mean
    torch.testing.assert_close(chain(states), whole.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        states @ chain.weight + chain.bias.float(), whole.float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("inner", "n_factors"), [(3, 2), (23, 2), (25, 1)])
def test_a_map_is_kept_by_what_is_smaller(inner, n_factors):
    factors = torch.randn(20, inner).double(), torch.randn(inner, 30).double()
    affine = Affine(factors, torch.randn(30).double())
    single = affine.single()
    assert len(single.factors) == n_factors
    assert {part.dtype for part in (*single.factors, single.bias)} == {torch.float32}
    states = torch.randn(4, 20)
    torch.testing.assert_close(single(states), affine(states), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [20, 50])
def test_principal_coordinates_lead_there_and_back(n):
    states, _ = regression(n, 30, 3, 0.1)
    svd = thin_svd(states)
    coordinates = svd.to_coordinates()(states)
    torch.testing.assert_close(coordinates, (svd.u * svd.s).float(), atol=1e-5, rtol=1e-4)
    back = svd.from_coordinates(torch.eye(len(svd.s), dtype=torch.float64))
    torch.testing.assert_close(back(coordinates), states, atol=1e-5, rtol=1e-4)


def test_directions_up_to_the_least_are_dropped():
    states, _ = regression(20, 30, 3, 0.1)
    whole = thin_svd(states)
    least = float(whole.s[7:9].mean())
    assert torch.equal(thin_svd(states, least=least).s, whole.s[:8])
