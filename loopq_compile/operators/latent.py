"""Weights whose rounding is learned: 16-bit fixed-point numbers in units of a weight's scale (`loopq::from_latent`).

Quantization-aware training calls the number behind an integer its latent weight. A latent number l stands for the
weight `(l + 1/2) / 2^fraction * scale`. The half keeps it off the borders between two integers, so that every way of
rounding it gives the same integer. The range is twice that of the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopq_compile.operators.fusion import fused
from loopq_compile.operators.precision import all_wide, wide, wide_type

LATENT = torch.int16
"""The type in which latent numbers are stored."""
_WIDER = torch.int32
"""What compiled functions read and write: they handle 16-bit integers one by one, and these several at a time."""
_LOWEST, _HIGHEST = torch.iinfo(LATENT).min, torch.iinfo(LATENT).max


def fraction_of(bits: int) -> int:
    """Bits behind the point of a latent number, for integers of `bits` bits."""
    return torch.iinfo(LATENT).bits - 1 - bits


@torch.library.custom_op("loopq::from_latent", mutates_args=())
def from_latent(latent: Tensor, scale: Tensor, group_size: int, fraction: int) -> Tensor:
    """The weight that latent numbers stand for.

    Args:
        latent: `[N, K]`, int16.
        scale: `[N, K / group_size]` or `[N, 1]`, not zero.
        group_size: features per scale; divides K.
        fraction: bits behind the point.

    Returns:
        `[N, K]` in single precision at least.
    """
    groups = latent.to(_WIDER).unflatten(-1, (-1, group_size))
    return _weights(groups, scale.unsqueeze(-1), 1 << fraction).flatten(-2)


@from_latent.register_fake
def _(latent: Tensor, scale: Tensor, group_size: int, fraction: int) -> Tensor:
    return scale.new_empty(latent.shape, dtype=wide_type(scale.dtype))


def to_latent(x: Tensor, scale: Tensor, group_size: int, fraction: int) -> Tensor:
    """The latent numbers of a weight, `[N, K]` in int16; those outside the range become its ends."""
    return _latents(x.unflatten(-1, (-1, group_size)), scale.unsqueeze(-1), 1 << fraction).flatten(-2).to(LATENT)


def rounded_latents(
    latent: Tensor, scale: Tensor, group_size: int, fraction: int, q_min: int, q_max: int, dtype: torch.dtype
) -> Tensor:
    """`dequantize(quantize(from_latent(latent, scale), scale), scale)` in one pass, `[N, K]` in `dtype`."""
    groups = latent.to(_WIDER).unflatten(-1, (-1, group_size))
    return _rounded(groups, scale.unsqueeze(-1), 1 << fraction, q_min, q_max, dtype).flatten(-2)


def latent_gradients(
    grad: Tensor, latent: Tensor, scale: Tensor, group_size: int, fraction: int, q_min: int, q_max: int
) -> Tensor:
    """The straight-through gradient of a weight's position in units of its scale, `[N, K]` in bfloat16: zero outside
    the range of the integers.

    Args:
        grad: gradient of the rounded weight, `[N, K]`.
        latent, scale, group_size, fraction: as for `from_latent`.
        q_min, q_max: range of the integers.
    """
    groups = grad.unflatten(-1, (-1, group_size)), latent.to(_WIDER).unflatten(-1, (-1, group_size))
    return _gradients(*groups, scale.unsqueeze(-1), 1 << fraction, q_min, q_max).flatten(-2)


def moved_latents(latent: Tensor, gradient: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """Latent numbers, moved against the sign of their gradient.

    Args:
        latent, gradient: `[N, K]`.
        step: how far, in latent units; a scalar.
        noise: `[1, K]`, uniform in [0, 1): decides whether a broken number is rounded down or up, so that steps of
            less than a unit count, too.
    """
    return _moved(latent.to(_WIDER), gradient, step, noise).to(LATENT)


@fused
def _moved(latent: Tensor, gradient: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    moved = (latent.float() - step * gradient.float().sign() + noise).floor()
    return moved.clamp(_LOWEST, _HIGHEST).to(_WIDER)


def _ratio(latent: Tensor, unit: int, like: Tensor) -> Tensor:
    """The weight in units of its scale, in the type of `like`."""
    return (latent.to(like.dtype) + 0.5) / unit


@fused
def _weights(latent: Tensor, scale: Tensor, unit: int) -> Tensor:
    factors = wide(scale)
    return _ratio(latent, unit, factors) * factors


@fused
def _latents(x: Tensor, scale: Tensor, unit: int) -> Tensor:
    x, scale = all_wide(x, scale)
    return (x / scale * unit).floor().clamp(_LOWEST, _HIGHEST).to(_WIDER)


@fused
def _rounded(latent: Tensor, scale: Tensor, unit: int, q_min: int, q_max: int, dtype: torch.dtype) -> Tensor:
    factors = wide(scale)
    return (_ratio(latent, unit, factors).round().clamp(q_min, q_max) * factors).to(dtype)


@fused
def _gradients(grad: Tensor, latent: Tensor, scale: Tensor, unit: int, q_min: int, q_max: int) -> Tensor:
    factors = wide(scale)
    ratio = _ratio(latent, unit, factors)
    return torch.where((ratio >= q_min) & (ratio <= q_max), grad * factors, 0.0).to(torch.bfloat16)
