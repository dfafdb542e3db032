"""The form of quantization that calibration differentiates: `loopq::fake_quantize`, and the gradient of
`loopq::dynamic_scale`.

A program holds `dequantize(quantize(x, s), s)`, between which integers flow and gradients do not. Calibration replaces
such a pair by `fake_quantize(x, s)`, which computes the same numbers and has the straight-through gradient:
with `r = x / s` and `q = clip(round(r))`,

    d y / d x = 1 where q_min <= r <= q_max, else 0              (Bengio et al. 2013)
    d y / d s = q - r inside the range, q outside                (LSQ, Esser et al. 2020, eq. 3)
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.operators.quantize import _wide, dynamic_scale


@torch.library.custom_op("loopq::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    """`dequantize(quantize(x, scale), scale)`; see `loopq_compile.operators.quantize` for shapes.

    Returns:
        `[..., K]` in the type of `x`.
    """
    groups, wide = _wide(x).unflatten(-1, (-1, group_size)), _wide(scale).unsqueeze(-1)
    return (groups / wide).round_().clamp_(q_min, q_max).mul_(wide).flatten(-2).to(x.dtype)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, scale, *limits = inputs
    ctx.save_for_backward(x, scale)  # type: ignore[arg-type]
    ctx.limits = limits  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size, q_min, q_max = ctx.limits  # type: ignore[attr-defined]
    groups, wide = _wide(x).unflatten(-1, (-1, group_size)), _wide(scale).unsqueeze(-1)
    grads = _wide(grad).unflatten(-1, (-1, group_size))
    ratio = groups / wide
    inside = (ratio >= q_min) & (ratio <= q_max)
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        grad_x = (grads * inside).flatten(-2).to(x.dtype)
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        slope = ratio.round().clamp_(q_min, q_max).sub_(ratio * inside)
        grad_scale = (grads * slope).sum(-1).sum_to_size(scale.shape).to(scale.dtype)
    return grad_x, grad_scale, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_save)


def _save_dynamic(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, clip, *limits = inputs
    ctx.save_for_backward(x, clip)  # type: ignore[arg-type]
    ctx.limits = limits  # type: ignore[attr-defined]


def _backward_dynamic(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, clip = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size, q_max = ctx.limits  # type: ignore[attr-defined]
    groups = _wide(x).unflatten(-1, (-1, group_size))
    largest, position = groups.abs().max(-1, keepdim=True)
    wide = _wide(grad) / q_max
    grad_x = grad_clip = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        at_largest = (wide * _wide(clip)).unsqueeze(-1) * groups.gather(-1, position).sign()
        grad_x = torch.zeros_like(groups).scatter_(-1, position, at_largest).flatten(-2).to(x.dtype)
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        grad_clip = (wide * largest.squeeze(-1)).sum_to_size(clip.shape).to(clip.dtype)
    return grad_x, grad_clip, None, None


dynamic_scale.register_autograd(_backward_dynamic, setup_context=_save_dynamic)
