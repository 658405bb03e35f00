"""Products by their half, against the whole."""

import pytest
import torch

from expertsteer.gram import gram_matrix, quadratic_forms


@pytest.mark.parametrize("shape", [(1, 3), (255, 7), (256, 5), (257, 4), (1001, 3), (2, 403, 6)])
def test_a_gram_matrix_by_bands_is_the_whole(shape):
    rows = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(gram_matrix(rows), rows @ rows.mT)


@pytest.mark.parametrize("d", [1, 255, 256, 258, 403])
def test_quadratic_forms_by_bands_are_those_of_the_whole(d):
    rows, factor = (torch.randn(9, d, dtype=torch.float64) for _ in range(2))
    matrix = factor.T @ factor
    expected = (rows @ matrix * rows).sum(1)
    torch.testing.assert_close(quadratic_forms(rows, matrix), expected)


def test_no_rows_have_no_products():
    assert gram_matrix(torch.empty(0, 4)).shape == (0, 0)
    assert quadratic_forms(torch.empty(3, 0), torch.empty(0, 0)).tolist() == [0, 0, 0]
