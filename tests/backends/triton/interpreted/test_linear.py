"""`loopq_triton::packed_linear` against its definition and against integers."""

import pytest
import torch

from loopq_compile.backends.triton.configurations import DECODE_ROWS, linear_tile
from loopq_compile.operators import ops
from loopq_compile.operators.packed import pack_codes, pack_weight
from tests.backends.triton.kernels import kernels

# One row, decode and prefill, both sides of every tile edge, outputs that no tile divides.
SHAPES = [(1, 9, 32), (1, 64, 64), (3, 65, 96), (16, 40, 1024), (17, 63, 64), (64, 130, 32), (129, 129, 64)]


def integers(rows, features, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, features), generator=generator, dtype=torch.int8)


def problem(shape, bits=(4, 4), group_size=32, weights=1):
    """Codes of activations, packed codes, and `(codes, packed)` of weights with scale 1."""
    m, n, k = shape
    a = integers(m, k, bits[1])
    packed = pack_codes(a) if bits[1] <= 4 else a
    codes = [integers(n, k, bits[0], seed) for seed in range(1, weights + 1)]
    stack = [pack_weight(w, torch.ones(n, 1), group_size, bits[0]) for w in codes]
    return a, packed, codes, torch.stack([w for w, _ in stack]), torch.stack([s for _, s in stack])


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8)], ids=["w4a4", "w4a8", "w8a8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_sums_are_exact(shape, bits):
    a, packed, (w,), weight, scale = problem(shape, bits)
    ones = torch.ones(shape[0], shape[2] // 32)
    found = kernels.packed_linear(packed, ones, weight, scale, None, 0, 32, torch.float32)
    assert torch.equal(found.double(), (a.double() @ w.double().t()))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [(4, 4), (8, 8)], ids=["w4a4", "w8a8"])
def test_the_largest_sums_do_not_overflow(group_size, bits):
    lowest = -(1 << (bits[0] - 1))
    a = torch.full((2, 128), lowest, dtype=torch.int8)
    w = torch.full((16, 128), lowest, dtype=torch.int8)
    w[1] = -1 - lowest
    weight, scale = pack_weight(w, torch.ones(16, 1), group_size, bits[0])
    packed = pack_codes(a) if bits[1] <= 4 else a
    ones = torch.ones(2, 128 // group_size)
    found = kernels.packed_linear(packed, ones, weight[None], scale[None], None, 0, group_size, torch.float32)
    assert torch.equal(found.double(), a.double() @ w.double().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 40, 64), (2, 33, 1024), (20, 70, 96)], ids=str)
def test_scales_and_bias_equal_the_definition(shape, dtype):
    m, n, k = shape
    _, packed, _, weight, _ = problem(shape)
    generator = torch.Generator().manual_seed(5)
    scale = torch.randn(m, k // 32, generator=generator) * torch.tensor([1e-3, 3.0]).repeat(k)[: k // 32]
    weight_scale, bias = torch.randn(1, k // 32, n, generator=generator), torch.randn(n, generator=generator)
    arguments = (packed, scale, weight, weight_scale, bias.to(dtype), 0, 32, dtype)
    found, expected = kernels.packed_linear(*arguments), ops.packed_linear(*arguments)
    assert found.dtype == dtype and found.shape == (m, n)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("groups", [1, 3, 17])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (5, 33), (18, 65)])
def test_odd_sizes_of_everything(group_size, groups, rows, outputs):
    """Sizes that no tile, split or power of two divides, weights per loop, a bias, groups of zeros, huge scales."""
    k = groups * group_size
    generator = torch.Generator().manual_seed(rows)
    _, packed, _, weight, _ = problem((rows, outputs, k), group_size=group_size, weights=2)
    weight[:, groups // 2] = 0
    scale = torch.randn(rows, groups, generator=generator)
    scale[:, 0], scale[0] = 0.0, scale[0] * 1e20
    weight_scale = torch.randn(2, groups, outputs, generator=generator) * 1e-3
    bias = torch.randn(outputs, generator=generator)
    for row in (0, 1, 5):
        arguments = (packed, scale, weight, weight_scale, bias, row, group_size, torch.float32)
        found, expected = kernels.packed_linear(*arguments).double(), ops.packed_linear(*arguments).double()
        assert ((found - expected).abs() <= 2e-6 * expected.abs().amax(1, keepdim=True).clamp_min(1)).all()


@pytest.mark.parametrize("rows", [2, 20])
def test_the_row_is_chosen_at_run_time(rows):
    a, packed, codes, weight, scale = problem((rows, 24, 64), weights=3)
    ones = torch.ones(rows, 2)
    for row, used in ((0, 0), (2, 2), (7, 2)):
        found = kernels.packed_linear(packed, ones, weight, scale, None, row, 32, torch.float32)
        assert torch.equal(found.double(), a.double() @ codes[used].double().t())


def test_leading_dimensions_stay():
    a, packed, (w,), weight, scale = problem((6, 16, 32))
    found = kernels.packed_linear(packed.view(2, 3, 16), torch.ones(2, 3, 1), weight, scale, None, 0, 32, torch.float32)
    assert torch.equal(found, (a.float() @ w.float().t()).view(2, 3, 16))


def test_the_shapes_reach_the_decode_variant_with_and_without_splitting():
    splits = {linear_tile(m, n, k // 32).split for m, n, k in SHAPES if m <= DECODE_ROWS}
    assert len(splits) > 1 and 1 in splits
    assert {linear_tile(m, n, k // 32).rows for m, n, k in SHAPES} == {16, 64, 128}


def test_operands_may_lie_in_any_order():
    _, packed, _, weight, scale = problem((3, 33, 64))
    ones, bias = torch.rand(2, 3).t(), torch.rand(33, 2)[:, 1]
    turned = [part.transpose(0, -1).contiguous().transpose(0, -1) for part in (packed, weight, scale)]
    codes, weights, scales = turned
    found = kernels.packed_linear(codes, ones, weights, scales, bias, 0, 32, torch.float32)
    expected = ops.packed_linear(packed, ones, weight, scale, bias, 0, 32, torch.float32)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
