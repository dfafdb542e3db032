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

from loopq_compile.operators.fusion import fused
from loopq_compile.operators.quantize import _wide, dynamic_scale


@fused
def _round(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    groups, wide = x.unflatten(-1, (-1, group_size)), scale.unsqueeze(-1)
    return ((groups / wide).round().clamp(q_min, q_max) * wide).flatten(-2)


@fused
def _round_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int
) -> tuple[Tensor, Tensor]:
    grads, wide = grad.unflatten(-1, (-1, group_size)), scale.unsqueeze(-1)
    ratio = x.unflatten(-1, (-1, group_size)) / wide
    inside = ((ratio >= q_min) & (ratio <= q_max)).to(ratio.dtype)
    slope = ratio.round().clamp(q_min, q_max) - ratio * inside
    return (grads * inside).flatten(-2), (grads * slope).sum(-1)


@fused
def _scale_gradients(grad: Tensor, x: Tensor, clip: Tensor, group_size: int, q_max: int) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, group_size))
    magnitudes = groups.abs()
    largest = magnitudes.amax(-1, keepdim=True)
    # Where several are largest the gradient is shared, as that of amax is.
    at = (magnitudes == largest).to(x.dtype)
    at = at * groups.sign() / at.sum(-1, keepdim=True)
    return (at * (grad * clip / q_max).unsqueeze(-1)).flatten(-2), grad * largest.squeeze(-1) / q_max


@torch.library.custom_op("loopq::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    """`dequantize(quantize(x, scale), scale)`; see `loopq_compile.operators.quantize` for shapes.

    Returns:
        `[..., K]` in the type of `x`.
    """
    return _round(_wide(x), _wide(scale), group_size, q_min, q_max).to(x.dtype)


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
    grad_x, grad_scale = _round_gradients(_wide(grad), _wide(x), _wide(scale), group_size, q_min, q_max)
    return grad_x.to(x.dtype), grad_scale.sum_to_size(scale.shape).to(scale.dtype), None, None, None


fake_quantize.register_autograd(_backward, setup_context=_save)


def _save_dynamic(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, clip, *limits = inputs
    ctx.save_for_backward(x, clip)  # type: ignore[arg-type]
    ctx.limits = limits  # type: ignore[attr-defined]


def _backward_dynamic(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, clip = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size, q_max = ctx.limits  # type: ignore[attr-defined]
    grad_x, grad_clip = _scale_gradients(_wide(grad), _wide(x), _wide(clip), group_size, q_max)
    return grad_x.to(x.dtype), grad_clip.sum_to_size(clip.shape).to(clip.dtype), None, None


dynamic_scale.register_autograd(_backward_dynamic, setup_context=_save_dynamic)
