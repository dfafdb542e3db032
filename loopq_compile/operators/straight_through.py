"""The form of quantization that calibration differentiates: `loopq::fake_quantize`, `loopq::fake_quantize_dynamic`, and
the gradients of `loopq::dynamic_scale` and `loopq::offset`.

A program holds `dequantize(quantize(x, s), s)`; integers flow between the two, gradients do not. Calibration replaces
such a pair by `fake_quantize(x, s)`, which computes the same numbers and has the straight-through gradient:
with `r = x / s` and `q = clip(round(r))`,

    d y / d x = 1 where q_min <= r <= q_max, else 0              (Bengio et al. 2013)
    d y / d s = q - r inside the range, q outside                (LSQ, Esser et al. 2020, eq. 3)

`fake_quantize_dynamic` is the same with a scale that follows x. Kernels see `[n, groups, size]`: the size is a constant
for the compiler, which vectorizes groups of 32 (measured: 20 times faster than with a variable size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.operators.fusion import fused
from loopq_compile.operators.precision import wide
from loopq_compile.operators.quantize import bounded, dynamic_scale, offset, peak


@fused
def _round(x: Tensor, scale: Tensor, q_min: int, q_max: int) -> Tensor:
    factors = wide(scale).unsqueeze(-1)
    return ((wide(x) / factors).round().clamp(q_min, q_max) * factors).to(scale.dtype)


@fused
def _round_gradients(grad: Tensor, x: Tensor, scale: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    grads, ratio = wide(grad), wide(x) / wide(scale).unsqueeze(-1)
    inside = ((ratio >= q_min) & (ratio <= q_max)).to(ratio.dtype)
    slope = ratio.round().clamp(q_min, q_max) - ratio * inside
    return (grads * inside).to(x.dtype), (grads * slope).sum(-1)


@fused
def _pass_inside(grad: Tensor, x: Tensor, scale: Tensor, q_min: int, q_max: int) -> Tensor:
    ratio = wide(x) / wide(scale).unsqueeze(-1)
    return torch.where((ratio >= q_min) & (ratio <= q_max), wide(grad), 0.0).to(x.dtype)


@fused
def _scale_gradients(grad: Tensor, x: Tensor, clip: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    groups, factor = wide(x), wide(clip) / limit
    largest = peak(groups, limit)
    return (_at_peak(groups, largest, limit) * (grad * factor).unsqueeze(-1)).to(x.dtype), grad * largest / limit


@fused
def _round_dynamic(x: Tensor, clip: Tensor, q_min: int, q_max: int, limit: int) -> Tensor:
    groups = wide(x)
    scale = _scale(peak(groups, limit) * (wide(clip) / limit), x.dtype).unsqueeze(-1)
    return ((groups / scale).round().clamp(q_min, q_max) * scale).to(x.dtype)


@fused
def _round_dynamic_gradients(
    grad: Tensor, x: Tensor, clip: Tensor, q_min: int, q_max: int, limit: int
) -> tuple[Tensor, Tensor]:
    grads, groups, factor = wide(grad), wide(x), wide(clip) / limit
    largest = peak(groups, limit)
    ratio = groups / _scale(largest * factor, x.dtype).unsqueeze(-1)
    inside = ((ratio >= q_min) & (ratio <= q_max)).to(ratio.dtype)
    slope = (grads * (ratio.round().clamp(q_min, q_max) - ratio * inside)).sum(-1)
    through = _at_peak(groups, largest, limit) * (slope * factor).unsqueeze(-1)
    return (grads * inside + through).to(x.dtype), slope * largest / limit


def _scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as `dynamic_scale` stores it for tensors of type `dtype`, in a wide type."""
    return wide(bounded(scale.to(dtype)))


def _at_peak(groups: Tensor, largest: Tensor, limit: int) -> Tensor:
    """The gradient of the peak; several largest entries share it, as with `amax`."""
    found = groups if limit < 0 else groups.abs()
    at = (found == largest.unsqueeze(-1)).to(groups.dtype)
    at = at / at.sum(-1, keepdim=True)
    return at if limit < 0 else at * groups.sign()


def _rows(x: Tensor, group_size: int) -> Tensor:
    return x.reshape(-1, x.shape[-1] // group_size, group_size)


def _scale_rows(scale: Tensor, x: Tensor) -> Tensor:
    """Scales or clip ratios in a shape that broadcasts with `[n, groups]`."""
    if scale.numel() == scale.shape[-1]:
        return scale.reshape(1, -1)
    return scale.expand(*x.shape[:-1], scale.shape[-1]).reshape(-1, scale.shape[-1])


def _reduce(gradient: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """The sum of a gradient `[n, groups]` over the dimensions along which `like` was broadcast."""
    if like.numel() == like.shape[-1]:  # one pass instead of one for each leading dimension
        gradient = gradient.sum(0)
        return gradient.sum_to_size(like.shape[-1:]).reshape(like.shape).to(like.dtype)
    return gradient.view(*x.shape[:-1], -1).sum_to_size(like.shape).to(like.dtype)


@torch.library.custom_op("loopq::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    """`dequantize(quantize(x, scale), scale)`; see `loopq_compile.operators.quantize` for shapes.

    Returns:
        `[..., K]` in the type of `scale`, as `dequantize` does.
    """
    return _round(_rows(x, group_size), _scale_rows(scale, x), q_min, q_max).view(x.shape)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    return scale.new_empty(x.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, scale, *limits = inputs
    ctx.save_for_backward(x, scale)  # type: ignore[arg-type]
    ctx.limits = limits  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size, q_min, q_max = ctx.limits  # type: ignore[attr-defined]
    arguments = _rows(grad, group_size), _rows(x, group_size), _scale_rows(scale, x), q_min, q_max
    if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        return _pass_inside(*arguments).view(x.shape), None, None, None, None
    grad_x, grad_scale = _round_gradients(*arguments)
    return grad_x.view(x.shape), _reduce(grad_scale, x, scale), None, None, None


fake_quantize.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("loopq::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor, clip: Tensor, group_size: int, q_min: int, q_max: int, limit: int) -> Tensor:
    """`fake_quantize(x, dynamic_scale(x, clip, group_size, limit))` in one step.

    Args:
        x: `[..., K]`, floating point.
        clip: clip ratios, `[K / group_size]`, `[1]`, or one per row and group.
        group_size: features per scale; divides K.
        q_min, q_max: range of the integers.
        limit: `q_max`, or `q_min` for scales with a sign.

    Returns:
        `[..., K]` in the type of `x`.
    """
    return _round_dynamic(_rows(x, group_size), _scale_rows(clip, x), q_min, q_max, limit).view(x.shape)


@fake_quantize_dynamic.register_fake
def _(x: Tensor, clip: Tensor, group_size: int, q_min: int, q_max: int, limit: int) -> Tensor:
    return x.new_empty(x.shape)


def _backward_both(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, clip = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size, *limits = ctx.limits  # type: ignore[attr-defined]
    rows = _rows(grad, group_size), _rows(x, group_size), _scale_rows(clip, x)
    grad_x, grad_clip = _round_dynamic_gradients(*rows, *limits)
    return grad_x.view(x.shape), _reduce(grad_clip, x, clip), None, None, None, None


fake_quantize_dynamic.register_autograd(_backward_both, setup_context=_save)


def _backward_dynamic(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, clip = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size, limit = ctx.limits  # type: ignore[attr-defined]
    grads = wide(grad).reshape(-1, grad.shape[-1])
    grad_x, grad_clip = _scale_gradients(grads, _rows(x, group_size), _scale_rows(clip, x), limit)
    return grad_x.view(x.shape), _reduce(grad_clip, x, clip), None, None


dynamic_scale.register_autograd(_backward_dynamic, setup_context=_save)


def _save_offset(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, steps, scale, ctx.group_size = inputs  # type: ignore[attr-defined]
    ctx.dtype = x.dtype  # type: ignore[attr-defined]
    ctx.save_for_backward(steps, scale)  # type: ignore[arg-type]


def _backward_offset(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    steps, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    groups = grad.unflatten(-1, (-1, ctx.group_size))  # type: ignore[attr-defined]
    grad_steps = grad_scale = None
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        grad_steps = _times(groups, scale.unsqueeze(-1), steps.dtype).flatten(-2)
    if ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
        slope = (groups * steps.unflatten(-1, groups.shape[-2:])).sum(-1)
        grad_scale = slope.sum_to_size(scale.shape).to(scale.dtype)
    return grad.to(ctx.dtype), grad_steps, grad_scale, None  # type: ignore[attr-defined]


@fused
def _times(groups: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (groups * scale).to(dtype)


offset.register_autograd(_backward_offset, setup_context=_save_offset)


@fused
def _to_codes(x: Tensor, scale: Tensor, q_min: int, q_max: int) -> Tensor:
    return (wide(x) / wide(scale).unsqueeze(-1)).round().clamp(q_min, q_max).to(torch.int8)


@fused
def _from_codes(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    factors = wide(scale).unsqueeze(-1)
    return (codes.to(factors.dtype) * factors).to(dtype)


def weight_codes(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    """`loopq::quantize` of a weight in one pass over it: int8, `[N, K]`."""
    return _to_codes(_rows(x, group_size), _scale_rows(scale, x), q_min, q_max).view(x.shape)


def weight_values(codes: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """`loopq::dequantize` of a weight in one pass over it, `[N, K]` in `dtype`."""
    return _from_codes(_rows(codes, group_size), _scale_rows(scale, codes), dtype).view(codes.shape)
