"""Symmetric group quantization: `loopq::dynamic_scale`, `loopq::quantize`, `loopq::dequantize`.

The last dimension (K features) is cut into groups of `group_size` neighbours; a group shares one scale. Scales have
as many entries in their last dimension as there are groups, or one entry for all of them; leading dimensions
broadcast. Arithmetic is in single precision at least, also for half-precision tensors. Integers really flow between
`quantize` and `dequantize`, so gradients do not; `operators.straight_through` has the form for calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-12
"""Scales never fall below this: a group of zeros quantizes to zeros, not to NaN. In half precision, where this
number is zero, the smallest normal number of the type takes its place."""


def smallest_scale(dtype: torch.dtype) -> float:
    """Lower bound of scales stored in `dtype`."""
    return max(SMALLEST_SCALE, torch.finfo(dtype).tiny)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("loopq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, group_size: int, q_min: int, q_max: int) -> Tensor:
    """`clip(round(x / scale), q_min, q_max)` with ties to even (LoopQ eq. 4).

    Args:
        x: `[..., K]`, floating point.
        scale: `[..., K / group_size]` or `[..., 1]`, positive.
        group_size: features per scale; divides K.
        q_min, q_max: range of the integers, inside int8.

    Returns:
        Integers as int8, `[..., K]`.
    """
    groups = _wide(x).unflatten(-1, (-1, group_size))
    codes = torch.round(groups / _wide(scale).unsqueeze(-1)).clamp(q_min, q_max)
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
    wide = _wide(scale).unsqueeze(-1)
    groups = codes.unflatten(-1, (-1, group_size)).to(wide.dtype)
    return (groups * wide).flatten(-2).to(scale.dtype).contiguous()


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    return scale.new_empty(codes.shape)


@torch.library.custom_op("loopq::dynamic_scale", mutates_args=())
def dynamic_scale(x: Tensor, clip: Tensor, group_size: int, q_max: int) -> Tensor:
    """`clip * max|x_group| / q_max` for every token and group.

    Args:
        x: `[..., K]`, floating point.
        clip: clip ratios, `[K / group_size]`, `[1]`, or (for weights) one per row and group; 1 keeps the whole range
            of a group.
        group_size: features per scale; divides K.
        q_max: largest integer.

    Returns:
        Scales `[..., K / group_size]` in the type of `x`, at least `smallest_scale`.
    """
    largest = _wide(x.unflatten(-1, (-1, group_size)).abs().amax(-1))
    return (largest * (_wide(clip) / q_max)).to(x.dtype).clamp_min(smallest_scale(x.dtype))


@dynamic_scale.register_fake
def _(x: Tensor, clip: Tensor, group_size: int, q_max: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], x.shape[-1] // group_size])
