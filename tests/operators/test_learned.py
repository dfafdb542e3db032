"""Operators that calibration differentiates, against independent formulas."""

import pytest
import torch
from torch import Tensor

from loopq_compile.operators import ops
from loopq_compile.operators.adapter import EPSILON
from loopq_compile.operators.fusion import fusing

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.requires_grad_() if grad else x


@pytest.mark.parametrize(("d1", "d2"), [(4, 6), (8, 8), (12, 1), (1, 5)])
def test_kronecker_is_a_product_with_the_kronecker_product(d1, d2):
    x, left, right = random(3, 7, d1 * d2), random(d1, d1, seed=1), random(d2, d2, seed=2)
    torch.testing.assert_close(ops.kronecker(x, left, right), x @ torch.kron(left, right))


@pytest.mark.parametrize(("d1", "d2"), [(3, 4), (6, 1)])
def test_gradients_of_kronecker(d1, d2):
    arguments = (
        random(2, 3, d1 * d2, grad=True),
        random(d1, d1, seed=1, grad=True),
        random(d2, d2, seed=2, grad=True),
    )
    assert torch.autograd.gradcheck(ops.kronecker, arguments)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_kronecker_gives_the_gradients_that_are_asked_for(needs):
    shapes = ((2, 12), (3, 3), (4, 4))
    arguments = [random(*shape, seed=i, grad=need) for i, (shape, need) in enumerate(zip(shapes, needs, strict=True))]
    ops.kronecker(*arguments).sum().backward()
    assert [argument.grad is not None for argument in arguments] == list(needs)


def test_kronecker_undoes_itself_on_the_weight_side():
    """The basis of the convention: `(x P) (W P^-T)^T = x W^T`."""
    x, weight = random(5, 24), random(7, 24, seed=1)
    left, right = random(4, 4, seed=2), random(6, 6, seed=3)
    inverse = ops.kronecker(weight, torch.linalg.inv(left).t(), torch.linalg.inv(right).t())
    torch.testing.assert_close(ops.kronecker(x, left, right) @ inverse.t(), x @ weight.t())


def adapter_arguments(grad: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    shapes = ((2, 3, 8), (1,), (8,), (8,), (2,), (8, 2), (8, 2))
    return tuple(random(*shape, seed=i, grad=grad, dtype=dtype) for i, shape in enumerate(shapes))


def test_the_adapter_is_equation_seven():
    u, gate, gain, shift, mix, down, up = adapter_arguments()
    normed = u / (u.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()
    expected = u + gate * ((gain * normed + shift) + normed @ down @ torch.diag(mix) @ up.t())
    torch.testing.assert_close(ops.transition_adapter(u, gate, gain, shift, mix, down, up), expected)


def test_gradients_of_the_adapter():
    assert torch.autograd.gradcheck(ops.transition_adapter, adapter_arguments(grad=True))


def test_an_adapter_of_zeros_is_the_identity():
    u, gate, gain, shift, mix, down, up = adapter_arguments(dtype=torch.float32)
    assert ops.transition_adapter(u, gate, gain * 0, shift * 0, mix * 0, down, up).equal(u)
    assert ops.transition_adapter(u, gate * 0, gain, shift, mix, down, up).equal(u)


def separate(x: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
    return ops.dequantize(ops.quantize(x, scale, 4, *limits), scale, 4)


@pytest.mark.parametrize("columns", [2, 1])
@pytest.mark.parametrize("limits", [(-8, 7), (-2, 1)])
def test_fake_quantize_computes_what_the_pair_computes(columns, limits):
    x = random(3, 5, 8, dtype=torch.float32) * 3
    scale = random(3, 5, columns, seed=1, dtype=torch.float32).abs() + 0.05
    assert ops.fake_quantize(x, scale, 4, *limits).equal(separate(x, scale, limits))


@pytest.mark.parametrize("shape", [(3, 2), (2,), (1,)])
def test_gradients_of_fake_quantize_are_straight_through(shape):
    x = (random(3, 8) * 3).requires_grad_()
    scale = (random(*shape, seed=1).abs() + 0.2).requires_grad_()
    upstream = random(3, 8, seed=2)
    got = torch.autograd.grad(ops.fake_quantize(x, scale, 4, -8, 7), (x, scale), upstream)
    inside = straight_through_by_hand(x.detach(), scale.detach(), upstream)
    torch.testing.assert_close(got[0], inside[0])
    torch.testing.assert_close(got[1], inside[1])


def straight_through_by_hand(x: Tensor, scale: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the module, entry by entry."""
    wide = scale.expand(x.shape[0], -1) if scale.ndim == 1 else scale
    wide = wide.expand(-1, x.shape[1] // 4)
    grad_x, grad_scale = torch.zeros_like(x), torch.zeros_like(wide)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            ratio = float(x[i, j] / wide[i, j // 4])
            if -8 <= ratio <= 7:
                grad_x[i, j] = upstream[i, j]
                slope = round(ratio) - ratio
            else:
                slope = 7.0 if ratio > 0 else -8.0
            grad_scale[i, j // 4] += upstream[i, j] * slope
    return grad_x, grad_scale.sum_to_size(scale.shape)


@pytest.mark.parametrize("clip", [(2,), (1,), (3, 2)])
@pytest.mark.parametrize("limit", [7, -8])
def test_gradients_of_dynamic_scale(clip, limit):
    x = random(3, 8, grad=True)
    ratio = (random(*clip, seed=1).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.dynamic_scale(a, b, 4, limit), (x, ratio))
    groups = x.detach().unflatten(-1, (2, 4))
    peaks = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    expected = (peaks if limit < 0 else peaks.abs()) * ratio / limit
    torch.testing.assert_close(ops.dynamic_scale(x, ratio, 4, limit), expected)


@pytest.mark.parametrize("clip", [(2,), (1,), (3, 5, 2)])
@pytest.mark.parametrize("limit", [7, -8])
def test_rounding_with_a_scale_that_follows_is_both_steps_in_one(clip, limit):
    x = random(3, 5, 8, grad=True)
    ratio = (random(*clip, seed=1).abs() * 0.3 + 0.5).requires_grad_()
    upstream = random(3, 5, 8, seed=2)
    results = [
        ops.fake_quantize(x, ops.dynamic_scale(x, ratio, 4, limit), 4, -8, 7),
        ops.fake_quantize_dynamic(x, ratio, 4, -8, 7, limit),
    ]
    assert results[0].equal(results[1])
    expected, got = (torch.autograd.grad(y, (x, ratio), upstream) for y in results)
    torch.testing.assert_close(got, expected)


def sample(name: str, dtype: torch.dtype) -> tuple[object, ...]:
    x = random(2, 3, 8, dtype=dtype, grad=True)
    if name == "kronecker":
        return x, random(2, 2, seed=1, dtype=dtype, grad=True), random(4, 4, seed=2, dtype=dtype, grad=True)
    if name == "transition_adapter":
        return adapter_arguments(grad=True, dtype=dtype)
    if name == "fake_quantize":
        return x, (random(2, 3, 2, dtype=dtype).abs() + 0.1).requires_grad_(), 4, -8, 7
    if name == "fake_quantize_dynamic":
        return x, (random(2, dtype=dtype).abs() + 0.1).requires_grad_(), 4, -8, 7, -8
    return x, (random(2, dtype=dtype).abs() + 0.1).requires_grad_(), 4, 7


NAMES = ("kronecker", "transition_adapter", "fake_quantize", "fake_quantize_dynamic", "dynamic_scale")


@pytest.mark.parametrize("name", NAMES)
def test_registration(name):
    torch.library.opcheck(getattr(ops, name).default, sample(name, torch.float32), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_in_half_precision(name, dtype):
    arguments = sample(name, dtype)
    result = getattr(ops, name)(*arguments)
    assert result.dtype == dtype
    result.sum().backward()
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    assert all(x.grad is not None and x.grad.dtype == dtype for x in tensors)
    wide = getattr(ops, name)(*(x.detach().float() if isinstance(x, Tensor) else x for x in arguments))
    torch.testing.assert_close(result.float(), wide, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:Calibration runs without fused kernels")  # a machine without a compiler
def test_fused_kernels_compute_the_same():
    def gradients():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 64, generator=generator).requires_grad_()
        clip = torch.rand(2, generator=generator).requires_grad_()
        y = ops.fake_quantize(x, ops.dynamic_scale(x, clip, 32, 7), 32, -8, 7)
        return [y, *torch.autograd.grad(y.square().sum(), [x, clip])]

    plain = gradients()
    with fusing():
        fused = gradients()
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(other, one)
