"""The quantization operators against an independent formula, and as well-behaved PyTorch operators."""

import numpy as np
import pytest
import torch

from loopq_compile.graph.scheme import quantized_range
from loopq_compile.operators import dequantize, dynamic_scale, quantize


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [2, 32, 64])
def test_quantize_rounds_to_nearest_even_and_clips(bits, group):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(bits))
    scale = torch.rand(64 // group) * 0.3 + 0.05
    low, high = quantized_range(bits)
    codes = quantize(x, scale, group, low, high)
    expected = np.clip(np.rint(x.numpy() / np.repeat(scale.numpy(), group)), low, high)
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(codes.numpy(), expected)
    np.testing.assert_allclose(
        dequantize(codes, scale, group).numpy(), expected * np.repeat(scale.numpy(), group), rtol=1e-6
    )


def test_ties_go_to_even():
    codes = quantize(torch.tensor([[0.5, 1.5, 2.5, -0.5]]), torch.ones(1), 4, -8, 7)
    assert codes.tolist() == [[0, 2, 2, 0]]


def test_dynamic_scale_is_per_token_and_group():
    x = torch.tensor([[1.0, -3.0, 0.5, 0.25], [0.0, 0.0, 7.0, 1.0]])
    scale = dynamic_scale(x, torch.tensor([1.0, 0.5]), 2, 7)
    torch.testing.assert_close(scale[0], torch.tensor([3.0, 0.25]) / 7)
    torch.testing.assert_close(scale[1, 1], torch.tensor(0.5))


def test_a_signed_scale_makes_the_largest_entry_the_smallest_integer():
    x = torch.tensor([[1.0, -4.0, 0.5, 0.25], [0.0, 1.0, 8.0, -7.5]])
    scale = dynamic_scale(x, torch.ones(1), 2, -8)
    torch.testing.assert_close(scale, torch.tensor([[0.5, -0.0625], [-0.125, -1.0]]))
    assert quantize(x, scale, 2, -8, 7).tolist() == [[2, -8, -8, -4], [0, -8, -8, 7]]


@pytest.mark.parametrize("limit", [7, -8])
def test_a_group_of_zeros_stays_zero(limit):
    x = torch.zeros(2, 8)
    scale = dynamic_scale(x, torch.ones(1), 4, limit)
    assert torch.equal(dequantize(quantize(x, scale, 4, -8, 7), scale, 4), x)


def test_one_scale_serves_all_groups():
    x = torch.randn(4, 64)
    one, many = torch.tensor([0.1]), torch.full((2,), 0.1)
    assert torch.equal(quantize(x, one, 32, -8, 7), quantize(x, many, 32, -8, 7))


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8)])
def test_operators_pass_pytorchs_own_checks(shape):
    x, scale = torch.randn(shape), torch.rand(2) + 0.1
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.loopq.quantize.default, (x, scale, 4, -8, 7), test_utils=tests)
    torch.library.opcheck(torch.ops.loopq.dynamic_scale.default, (x, scale, 4, 7), test_utils=tests)
    codes = quantize(x, scale, 4, -8, 7)
    torch.library.opcheck(torch.ops.loopq.dequantize.default, (codes, scale, 4), test_utils=tests)


def test_shape_functions_agree_on_non_contiguous_inputs():
    x = torch.randn(8, 3).t()
    torch.library.opcheck(
        torch.ops.loopq.quantize.default, (x, torch.ones(1), 4, -8, 7), test_utils=("test_faketensor",)
    )
