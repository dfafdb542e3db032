"""Hadamard matrices and the rotations made of them."""

import pytest
import torch

from loopq_compile.passes.transforms.hadamard import (
    balanced_factors,
    hadamard_factors,
    paley,
    random_orthogonal,
    sylvester,
)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 68, 76, 108, 140, 148, 180])
def test_paley_matrices_have_orthogonal_rows_of_signs(order):
    matrix = paley(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=matrix.dtype))


@pytest.mark.parametrize("order", [1, 2, 16, 128])
def test_sylvester_matrices_have_orthogonal_rows_of_signs(order):
    matrix = sylvester(order)
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=matrix.dtype))


@pytest.mark.parametrize("order", [2, 6, 10, 18, 92])
def test_orders_without_a_construction_say_so(order):
    assert paley(order) is None


@pytest.mark.parametrize("width", [64, 256, 576, 768, 1408, 1536, 2048, 5632])
def test_widths_of_language_models_get_a_hadamard_matrix(width):
    left, right = hadamard_factors(width, torch.Generator().manual_seed(0))
    assert len(left) * len(right) == width and len(left) + len(right) < 6 * width**0.5
    torch.testing.assert_close(left @ left.t(), torch.eye(len(left), dtype=left.dtype))
    magnitudes = left[:, :, None, None].abs() * right.abs()
    assert torch.allclose(magnitudes, torch.tensor(width**-0.5, dtype=left.dtype)), "every entry has the same magnitude"


@pytest.mark.parametrize("width", [1, 7, 26, 52, 90])
def test_other_widths_get_a_rotation(width):
    left, right = hadamard_factors(width, torch.Generator().manual_seed(0))
    whole = torch.kron(left, right)
    torch.testing.assert_close(whole @ whole.t(), torch.eye(width, dtype=whole.dtype))


def test_signs_come_from_the_seed():
    rotations = [torch.kron(*hadamard_factors(64, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert torch.equal(rotations[0], rotations[1]) and not torch.equal(rotations[0], rotations[2])


def test_random_orthogonal_matrices_are_orthogonal():
    matrix = random_orthogonal(9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(9, dtype=matrix.dtype))


@pytest.mark.parametrize(("width", "factors"), [(64, (8, 8)), (576, (24, 24)), (96, (8, 12)), (7, (1, 7)), (1, (1, 1))])
def test_factors_are_as_equal_as_divisors_allow(width, factors):
    assert balanced_factors(width) == factors
