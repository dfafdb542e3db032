"""Keys and values as integers: each token of each head is divided into groups with separate scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from loopq_compile.operators.quantize import smallest_scale

BITS = (8, 4)
"""Widths that a cache may have."""

_aten = torch.ops.aten


def quantize_cache_definition(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """`quantize_cache` in operators that every backend knows."""
    size = x.shape[-1]
    grouped = x.reshape([*x.shape[:-1], size // group_size, group_size])
    magnitude, smallest = grouped.abs().amax([-1], keepdim=True), smallest_scale(x.dtype)
    if bits == 8:
        scale = (magnitude / 127).clamp(min=smallest)
        codes = (grouped / scale).round().clamp(-127, 127).reshape(x.shape)
        return _aten._to_copy.default(codes, dtype=torch.int8), scale.squeeze(-1)
    # The entry of largest magnitude takes the code -8, so the scale has the opposite sign.
    step = (magnitude / 8).clamp(min=smallest)
    scale = torch.where(grouped.amin([-1], keepdim=True) + magnitude > 0, -step, step)
    codes = (grouped / scale).round().clamp(-8, 7).reshape(x.shape) + 8
    first, second = codes.split([size // 2, size // 2], -1)
    return _aten._to_copy.default(first + 16 * second, dtype=torch.uint8), scale.squeeze(-1)


def dequantize_cache_definition(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`dequantize_cache` in operators that every backend knows."""
    values = _aten._to_copy.default(codes, dtype=scale.dtype)
    if bits == 4:
        second = (values * 0.0625).floor()
        values = torch.cat([values - 16 * second, second], -1) - 8
    groups = scale.shape[-1]
    grouped = values.reshape([*values.shape[:-1], groups, values.shape[-1] // groups])
    return (grouped * scale.unsqueeze(-1)).reshape(values.shape)


@torch.library.custom_op("loopq::quantize_cache", mutates_args=())
def quantize_cache(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """New keys or values as they are stored.

    Args:
        x: `[..., size]`, the size of a head last.
        bits: 8: `round(x / scale)` with `scale = max|x| / 127` of the group. 4: the same with 8 codes on the side of
            the entry of largest magnitude, which gets -8, and 7 on the other. A byte holds two codes, offset by 8: that
            of channel `i` in the low half, that of `i + size / 2` in the high half.
        group_size: channels that share a scale; divides `size`.

    Returns:
        Codes, int8 `[..., size]` or uint8 `[..., size / 2]`, and scales `[..., size / group_size]`.
    """
    return quantize_cache_definition(x, bits, group_size)


@quantize_cache.register_fake
def _(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    *leading, size = x.shape
    stored = (torch.int8, size) if bits == 8 else (torch.uint8, size // 2)
    return x.new_empty([*leading, stored[1]], dtype=stored[0]), x.new_empty([*leading, size // group_size])


@torch.library.custom_op("loopq::dequantize_cache", mutates_args=())
def dequantize_cache(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Keys or values `[..., size]` from what `quantize_cache` stored; `codes` and `scale` as it returns them."""
    return dequantize_cache_definition(codes, scale, bits)


@dequantize_cache.register_fake
def _(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    *leading, size = codes.shape
    return scale.new_empty([*leading, size if bits == 8 else 2 * size])


def cached_attention_definition(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor,
    bits: int,
    scale: float,
    last: Tensor | None = None,
) -> Tensor:
    """`cached_attention` in operators of PyTorch; the heads of a token are adjacent in memory."""
    keys = dequantize_cache_definition(key, key_scale, bits)
    values = dequantize_cache_definition(value, value_scale, bits)
    grouped = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=grouped)
    return result.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("loopq::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor,
    bits: int,
    scale: float,
    last: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * query keyᵀ + mask) value` on keys and values as `quantize_cache` stored them.

    Args:
        query: `[batch, query heads, rows, size]`.
        key, key_scale, value, value_scale: codes `[batch, heads, total, ...]` and scales `[batch, heads, total,
            groups]`. Query head `h` reads head `h // (query heads / heads)`.
        mask: added to the scores, in the type of `query`, `[batch, query heads, rows, total]`; all but the last may be
            1.
        bits: of the codes, 8 or 4.
        scale: factor of the scores.
        last: int64 `[1]`, the last column that any query may see, if caches have room for more; kernels read no
            further. The mask must hide later columns, as causal masks do. None for all columns.

    Returns:
        `[batch, query heads, rows, size of a value]` in the type of `query`; the heads of a token are adjacent in
        memory. If a mask hides all columns by a finite number, the weights are equal.
    """
    return cached_attention_definition(query, key, key_scale, value, value_scale, mask, bits, scale, last)


@cached_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    mask: Tensor,
    bits: int,
    scale: float,
    last: Tensor | None = None,
) -> Tensor:
    return attention_like(query, value, bits)


def attention_like(query: Tensor, value: Tensor, bits: int) -> Tensor:
    """An uninitialized tensor for the result of `cached_attention`."""
    batch, heads, rows, _ = query.shape
    size = value.shape[-1] if bits == 8 else 2 * value.shape[-1]
    return query.new_empty([batch, rows, heads, size]).transpose(1, 2)
