"""Symmetric group quantization: `loopq::dynamic_scale`, `loopq::quantize`, `loopq::dequantize`; and `loopq::offset`,
which moves a weight before it is rounded.

The last dimension (K features) is cut into groups of `group_size` neighbours; a group shares one scale. Scales have as
many entries in their last dimension as there are groups, or one entry for all of them; leading dimensions broadcast.
Arithmetic is in single precision at least, also for half-precision tensors. Between `quantize` and `dequantize` there
are real integers, so no gradients; `operators.straight_through` has the form for calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.operators.fusion import fused
from loopq_compile.operators.precision import all_wide, wide, wide_type

SMALLEST_SCALE = 1e-12
"""Scales never fall below this, so a group of zeros quantizes to zeros, not to NaN. In float16, where this number is
zero, the smallest number above zero replaces it (not the smallest normal one, 6e-5, since weights of 1e-4 have smaller
scales)."""


def smallest_scale(dtype: torch.dtype) -> float:
    """Lower bound of scales stored in `dtype`."""
    return max(SMALLEST_SCALE, torch.finfo(dtype).tiny * torch.finfo(dtype).eps)


def peak(groups: Tensor, limit: int) -> Tensor:
    """The number that a group's scale follows, `[..., size] -> [...]`: the largest magnitude; for a negative `limit`,
    the entry of largest magnitude with its sign."""
    if limit > 0:
        return groups.abs().amax(-1)
    high, low = groups.amax(-1), groups.amin(-1)
    return torch.where(high > -low, high, low)


def bounded(scale: Tensor) -> Tensor:
    """`scale`, with entries of too small magnitude replaced by the smallest scale."""
    smallest = smallest_scale(scale.dtype)
    return torch.where(scale.abs() < smallest, smallest, scale)


@torch.library.custom_op("loopq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    """`clip(round(x / scale), q_min, q_max)` with ties to even (LoopQ eq. 4).

    Args:
        x: `[..., K]`, floating point.
        scale: `[..., K / group_size]` or `[..., 1]`, not zero. With a negative scale the codes change sign.
        group_size: features per scale; divides K.
        q_min, q_max: range of the integers, inside int8.

    Returns:
        Integers as int8, `[..., K]`.
    """
    groups = wide(x).unflatten(-1, (-1, group_size))
    codes = torch.round(groups / wide(scale).unsqueeze(-1)).clamp(q_min, q_max)
    return codes.to(torch.int8).flatten(-2).contiguous()


@quantize.register_fake
def _(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("loopq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """`codes * scale`, the inverse of `quantize` up to rounding.

    Args:
        codes: int8, `[..., K]`.
        scale: `[..., K / group_size]` or `[..., 1]`.
        group_size: features per scale; divides K.

    Returns:
        `[..., K]` in the type of `scale`.
    """
    factors = wide(scale).unsqueeze(-1)
    groups = codes.unflatten(-1, (-1, group_size)).to(factors.dtype)
    return (groups * factors).flatten(-2).to(scale.dtype).contiguous()


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    return scale.new_empty(codes.shape)


@torch.library.custom_op("loopq::dynamic_scale", mutates_args=())
def dynamic_scale(x: Tensor, clip: Tensor, group_size: int, limit: int) -> Tensor:
    """`clip * peak(x_group) / limit` for every token and group.

    With `limit = q_max` the peak is the largest magnitude, which becomes the code `q_max` or `-q_max`. With
    `limit = q_min` it is the entry of largest magnitude with its sign, which becomes `q_min`: the scale has the
    opposite sign, and the step is smaller by `q_max / -q_min`, since no integer on that side is unused (at 4 bits, a
    fifth less squared error for normally distributed numbers; llama.cpp's Q4_0 makes scales this way).

    Args:
        x: `[..., K]`, floating point.
        clip: clip ratios, `[K / group_size]`, `[1]`, or (for weights) one per row and group; 1 keeps the whole range
            of a group.
        group_size: features per scale; divides K.
        limit: the integer that the peak becomes if `clip` is 1; negative for scales with a sign.

    Returns:
        Scales `[..., K / group_size]` in the type of `x`, their magnitude at least `smallest_scale`.
    """
    return _peak_scale(x.unflatten(-1, (-1, group_size)), clip, limit)


@fused
def _peak_scale(groups: Tensor, clip: Tensor, limit: int) -> Tensor:
    largest = wide(peak(groups, limit))
    return bounded((largest * (wide(clip) / limit)).to(groups.dtype))


@dynamic_scale.register_fake
def _(x: Tensor, clip: Tensor, group_size: int, limit: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], x.shape[-1] // group_size])


@torch.library.custom_op("loopq::offset", mutates_args=())
def offset(x: Tensor, steps: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """`x + steps * scale`: moves a weight, in units of its scale, before it is rounded.

    Args:
        x: `[N, K]`, floating point.
        steps: `[N, K]`, floating point. Half precision is enough: integers change at halves.
        scale: `[N, K / group_size]` or `[N, 1]`.
        group_size: features per scale; divides K.

    Returns:
        `[N, K]` in single precision at least.
    """
    groups = x.unflatten(-1, (-1, group_size)), steps.unflatten(-1, (-1, group_size))
    return _shift(*groups, scale.unsqueeze(-1)).flatten(-2)


@fused
def _shift(x: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    x, steps, scale = all_wide(x, steps, scale)
    return x + steps * scale


@offset.register_fake
def _(x: Tensor, steps: Tensor, scale: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape, dtype=wide_type(x.dtype, scale.dtype))
