"""`loopq_triton::quantize_packed` against its definition: codes to the last bit, if sums are exact."""

import pytest
import torch

from loopq_compile.operators import ops
from loopq_compile.operators.packed import ACTIVATIONS, NORMS, unpack_codes
from loopq_compile.passes.transforms.hadamard import hadamard_factors
from tests.backends.triton.kernels import kernels


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(
    x,
    table,
    *,
    up=None,
    activation="",
    norm="",
    gain=None,
    shift=None,
    eps=1e-6,
    diagonal=None,
    factors=(None, None),
    loop=0,
    bits=4,
    limit=-8,
    group=32,
):
    front = (up, activation, norm, gain, shift, eps)
    arguments = (x, *front, diagonal, *factors, table, loop, group, bits, limit)
    (codes, scale), (right_codes, right_scale) = kernels.quantize_packed(*arguments), ops.quantize_packed(*arguments)
    assert codes.dtype == right_codes.dtype and codes.shape == right_codes.shape and scale.shape == right_scale.shape
    return _codes(codes), scale, _codes(right_codes), right_scale


def _codes(stored):
    return (unpack_codes(stored) if stored.dtype == torch.uint8 else stored).int()


def same(*arguments, **options):
    codes, scale, right_codes, right_scale = both(*arguments, **options)
    assert torch.equal(scale, right_scale)
    assert torch.equal(codes, right_codes)
    return codes, scale


NEAR = {torch.float32: (1e-5, 0.003), torch.bfloat16: (0.01, 0.03), torch.float16: (2e-3, 0.02)}
"""By type: how far scales may differ, and which share of the codes may round the other way."""


def near(x, *arguments, **options):
    """Scales and codes are nearly the same; a code differs by at most one, if its quotient is halfway between
    integers."""
    codes, scale, right_codes, right_scale = both(x, *arguments, **options)
    distance, turned = NEAR[x.dtype]
    torch.testing.assert_close(scale, right_scale, rtol=distance, atol=0)
    difference = (codes - right_codes).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < turned


@pytest.mark.parametrize(("bits", "limit"), [(4, -8), (4, 7), (3, -4), (8, 127), (4, 0), (8, 0)])
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 576), (5, 2048)], ids=str)
def test_plain_codes_are_exact(shape, bits, limit):
    table = random(1, shape[1] // 32, seed=1).abs() + 0.5
    same(random(*shape), table, bits=bits, limit=limit)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_groups_and_types(group, dtype):
    same(random(3, 384).to(dtype), torch.full((1, 384 // group), 0.9), group=group)


@pytest.mark.parametrize("limit", [-8, 7])
def test_zeros_extremes_and_ties(limit):
    """All-zero groups, huge and tiny ones, a single entry, quotients halfway between integers, both signs of zero."""
    x = torch.zeros(1, 8 * 32)
    x[0, 32:64] = random(32) * 1e30
    x[0, 64:96] = random(32) * 1e-30
    x[0, 96] = -5.0
    x[0, 128:160] = torch.arange(-8, 8, 0.5)
    x[0, 160:192] = -torch.arange(-8, 8, 0.5)
    x[0, 192:224] = torch.tensor(-0.0)
    x[0, 224:256] = 3.0
    codes, scale = same(x, torch.ones(1, 8), limit=limit)
    assert codes[0, :32].eq(0).all() and codes[0, 192:224].eq(0).all()
    assert codes[0, 96].abs() == abs(limit) and torch.isfinite(scale).all()


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("limit", [-8, 0])
def test_the_loop_selects_a_row_and_the_last_one_is_kept(columns, limit):
    table = random(3, columns, seed=2).abs() + 0.3
    scales = [same(random(2, 192), table, loop=loop, limit=limit)[1] for loop in (0, 1, 2, 9)]
    assert not torch.equal(scales[0], scales[1])
    assert torch.equal(scales[2], scales[3])


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        *((256, (16, 16)), (64, (8, 8)), (576, (36, 16)), (2048, (32, 64)), (1408, (32, 44)), (4096, (64, 64))),
        *((1344, (84, 16)), (1600, (200, 8)), (4096, (16, 256))),
    ],
    ids=str,
)
@pytest.mark.parametrize(("limit", "bits"), [(-8, 4), (0, 8)])
def test_transforms_of_whole_numbers_are_exact(width, sizes, limit, bits):
    """Products of small integers are exact in any order, so codes must agree to the last bit."""
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randint(-1, 2, (2, d, d), generator=generator).float() for d in sizes]
    x = torch.randint(-8, 9, (2, width), generator=generator).float()
    diagonal = torch.randint(1, 3, (1, width), generator=generator).float()
    same(x, torch.full((1, width // 32), 1.0), diagonal=diagonal, factors=factors, loop=1, limit=limit, bits=bits)


def test_constants_may_lie_in_any_order():
    """Columns of a gain for every loop, transposed tables, one side of a transform that all loops share."""
    gain, shift, diagonal = random(256, 3).abs(), random(256, 3, seed=1), random(256, 3, seed=2).abs() + 0.5
    table = random(8, 3, seed=3).abs() + 0.3
    near(random(3, 256), table.t(), norm="layer", gain=gain[:, 1], shift=shift[:, 2], diagonal=diagonal.t(), loop=1)
    factors = [random(rows, 16, 16, seed=rows).transpose(1, 2) / 4 for rows in (1, 3)]
    near(random(3, 256), table.t(), factors=factors, loop=2)


def test_a_transform_in_half_precision_rounds_where_the_definition_does():
    factors = [(factor / 4).to(torch.bfloat16)[None] for factor in hadamard_factors(256, torch.Generator())]
    x = torch.randint(-8, 9, (3, 256)).to(torch.bfloat16)
    same(x, torch.ones(1, 8), factors=factors)


@pytest.mark.parametrize("gain", [None, "gain"])
def test_norm_and_transform(gain):
    gain = None if gain is None else random(576, seed=4) + 1
    factors = [random(1, d, d, seed=d) / d**0.5 for d in (36, 16)]
    diagonal = random(3, 576, seed=6).abs() + 0.5
    near(random(9, 576), torch.ones(3, 18), norm="rms", gain=gain, diagonal=diagonal, factors=factors, loop=2)
    near(random(9, 576), torch.ones(3, 18), norm="rms", gain=gain, loop=2, bits=8, limit=127)


def test_swiglu_reads_halves_of_one_tensor():
    both_halves = random(4, 2 * 1408, seed=7)
    gate, up = both_halves.split(1408, -1)
    assert not gate.is_contiguous()
    near(gate, torch.ones(1, 44), up=up, activation="silu")
    near(
        gate, torch.ones(1, 44), up=up, activation="silu", factors=[random(1, d, d, seed=d) / d**0.5 for d in (32, 44)]
    )


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activation_functions(activation, gated, dtype):
    x = torch.cat([random(3, 352, seed=8) * 4, torch.tensor([[0.0, -30, 30, -1e30, 1e30, -0.5, 0.5, 1e-30]] * 3)], -1)
    x = torch.nn.functional.pad(x, (0, 24)).to(dtype)
    up = random(3, 384, seed=9).to(dtype) if gated else None
    near(x, torch.ones(1, 12), activation=activation, up=up)
    near(
        x[:, :352], torch.ones(1, 11), activation=activation, up=None if up is None else up[:, :352], bits=8, limit=127
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "sizes"), [(1, 32, None), (7, 96, None), (3, 576, (24, 24)), (2, 1408, (32, 44))]
)
def test_norms(norm, dtype, rows, width, sizes):
    """Tokens far from zero, a constant one, one of zeros; sizes that no power of two divides."""
    x = random(rows, width, seed=3) + 5
    x[0] = 2.0 if rows > 1 else x[0]
    x[-1] = 0.0 if rows > 2 else x[-1]
    gain, shift = random(width, seed=4) + 1, random(width, seed=5) if norm == "layer" else None
    factors = (None, None) if sizes is None else [random(1, d, d, seed=d) / d**0.5 for d in sizes]
    cast = [None if tensor is None else tensor.to(dtype) for tensor in (gain, shift)]
    near(x.to(dtype), torch.ones(1, 1), norm=norm, gain=cast[0], shift=cast[1], factors=factors)
    near(x.to(dtype), torch.full((1, 1), 0.3), norm=norm, eps=1e-3, bits=8, limit=0)


def test_leading_dimensions_stay():
    codes, scale = same(random(2, 3, 64), torch.ones(1, 2))
    assert codes.shape == (2, 3, 64) and scale.shape == (2, 3, 2)
