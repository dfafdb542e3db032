"""What fused kernels compute: `loopq::quantize_packed`, `loopq::packed_linear`, `loopq::transition_adapter_row`. Each
is several operators of a program in one, on packed integers. Passes `fuse-linears` and `fuse-adapters` make them.

They read rows of per-loop tables themselves. `loop` is an ordinary argument, so one kernel serves all loops. A loop
beyond the end of a table reads its last row (LoopQ appendix C.2); a table with one row is shared.

Two 4-bit codes fill a byte, the first in the low half. Weights are stored group by group, `[rows, groups, outputs,
group_size / 2]`, so that one group of all outputs is contiguous in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loopq_compile.operators.adapter import transition_adapter
from loopq_compile.operators.quantize import dequantize, dynamic_scale, quantize
from loopq_compile.operators.transform import kronecker

PACKED = torch.uint8
"""Type of packed 4-bit codes; wider codes are int8."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
NORMS = ("rms", "rms_rounded", "layer")
"""All compute in float32. `rms_rounded` rounds to the type of its input before the gain, as Hugging Face's norms do."""


def pack_codes(codes: Tensor) -> Tensor:
    """4-bit codes int8 `[..., K]`, in -8 to 7, as bytes `[..., K / 2]`; K is even."""
    low, high = codes.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low & 15) | (high << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Inverse of `pack_codes`: bytes `[..., K / 2]` to int8 `[..., K]`."""
    pairs = torch.stack([packed << 4, packed & 0xF0], dim=-1)
    return (pairs.view(torch.int8) >> 4).flatten(-2)


def pack_weight(codes: Tensor, scale: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """The form in which `packed_linear` reads one weight.

    Args:
        codes: int8, `[N, K]`.
        scale: `[N, K / group_size]` or `[N, 1]`.
        group_size: features per scale.
        bits: up to 4 bits are packed.

    Returns:
        Codes `[groups, N, group_size / 2]` (bytes) or `[groups, N, group_size]` (int8); scales `[groups, N]`, float32.
    """
    grouped = codes.unflatten(-1, (-1, group_size)).transpose(0, 1).contiguous()
    scales = scale.float().expand(-1, grouped.shape[0]).t().contiguous()
    return (pack_codes(grouped) if bits <= 4 else grouped), scales


def table_row(table: Tensor, loop: int) -> Tensor:
    """Row `loop` of a per-loop table, the last one for loops beyond its end."""
    return table[min(loop, table.shape[0] - 1)]


def _normed(x: Tensor, norm: str, gain: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    size = x.shape[-1:]
    if norm == "layer":
        return F.layer_norm(x, size, gain, shift, eps)
    if norm == "rms":
        return F.rms_norm(x.float(), size, None if gain is None else gain.float(), eps).to(x.dtype)
    rounded = F.rms_norm(x.float(), size, None, eps).to(x.dtype)
    return rounded if gain is None else rounded * gain


def _unpacked(codes: Tensor) -> Tensor:
    return unpack_codes(codes) if codes.dtype == PACKED else codes


@torch.library.custom_op("loopq::quantize_packed", mutates_args=())
def quantize_packed(
    x: Tensor,
    up: Tensor | None,
    activation: str,
    norm: str,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    diagonal: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    table: Tensor,
    loop: int,
    group_size: int,
    bits: int,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """What comes before a group of quantized linears: activation function or norm, transform, quantization.

    In this order, all steps optional except the last: the activation function; `* up`; norm; `* diagonal`;
    `kronecker(left, right)`; `quantize` with a row of `table` as scale, or with `dynamic_scale` and a row of clip
    ratios. Between steps, numbers are rounded to the type of `x`.

    Args:
        x: `[..., K]`, floating point.
        up: `[..., K]`, the other half of a gated activation function such as SwiGLU.
        activation: a key of `ACTIVATIONS`, or "" for none.
        norm: one of `NORMS`, or "" for none.
        gain, shift: `[K]`, of the norm; None means 1 and 0. RMS norms have no shift.
        eps: epsilon of the norm.
        diagonal: `[R, K]`, a table.
        left, right: tables `[R, d1, d1]` and `[R, d2, d2]`.
        table: scales or clip ratios, `[R, groups]` or `[R, 1]`.
        loop: the row to read.
        group_size: features per scale; divides K.
        bits: width of the codes, 2 to 8.
        limit: as in `dynamic_scale`; 0 for static scales.

    Returns:
        Codes: bytes `[..., K / 2]` up to 4 bits, else int8 `[..., K]`. Scales `[..., groups]` in float32.
    """
    if activation:
        x = ACTIVATIONS[activation](x)
    if up is not None:
        x = x * up
    if norm:
        x = _normed(x, norm, gain, shift, eps)
    if diagonal is not None:
        x = x * table_row(diagonal, loop)
    if left is not None and right is not None:
        x = kronecker(x, table_row(left, loop), table_row(right, loop))
    entries = table_row(table, loop)
    scale = dynamic_scale(x, entries, group_size, limit) if limit else entries
    codes = quantize(x, scale, group_size, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    scales = scale.float().expand(*x.shape[:-1], x.shape[-1] // group_size).clone(memory_format=torch.contiguous_format)
    return (pack_codes(codes) if bits <= 4 else codes), scales


@quantize_packed.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    group_size, bits, _ = arguments[-3:]
    return quantized_like(x, group_size, bits)


def quantized_like(x: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Uninitialized codes and scales as `quantize_packed` returns them."""
    *rows, features = x.shape
    width, kind = (features // 2, PACKED) if bits <= 4 else (features, torch.int8)
    codes = x.new_empty([*rows, width], dtype=kind)
    return codes, x.new_empty([*rows, features // group_size], dtype=torch.float32)


@torch.library.custom_op("loopq::packed_linear", mutates_args=())
def packed_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    row: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`x Wᵀ + bias` on integers: `y[m, n] = Σ_g scale[m, g] weight_scale[g, n] Σ_k codes[m, g, k] weight[g, n, k]`.

    The inner sums are exact integers; the outer one is in float32.

    Args:
        codes: bytes `[..., K / 2]` or int8 `[..., K]`.
        scale: float32, `[..., groups]`.
        weight: one weight, or several stacked along outputs, as `pack_weight` makes them, one for each row:
            `[R, groups, N, group_size / 2]` (bytes) or `[R, groups, N, group_size]` (int8).
        weight_scale: float32, `[R, groups, N]`.
        bias: `[N]`, for all rows.
        row: which of the R weights; beyond the end, the last.
        group_size: features per scale.
        dtype: type of the result.

    Returns:
        `[..., N]`.
    """
    grouped, scales = _unpacked(table_row(weight, row)), table_row(weight_scale, row)
    dense = (grouped.float() * scales.unsqueeze(-1)).transpose(0, 1).flatten(1)
    x = dequantize(_unpacked(codes), scale, group_size)
    return F.linear(x, dense, None if bias is None else bias.float()).to(dtype)


@packed_linear.register_fake
def _(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, *arguments: Any) -> Tensor:
    return scale.new_empty([*codes.shape[:-1], weight_scale.shape[-1]], dtype=arguments[-1])


@torch.library.custom_op("loopq::transition_adapter_row", mutates_args=())
def transition_adapter_row(
    u: Tensor, gate: Tensor, gain: Tensor, shift: Tensor, mix: Tensor, down: Tensor, up: Tensor, loop: int
) -> Tensor:
    """`loopq::transition_adapter` with row `loop` of its tables.

    Args:
        u: `[..., d]`.
        gate: `[R, 1]`; gain, shift: `[R, d]`; mix: `[R, r]`; tables.
        down, up: `[d, r]`, shared by all loops.
        loop: the row to read.

    Returns:
        `[..., d]` in the type of `u`.
    """
    rows = [table_row(table, loop) for table in (gate, gain, shift, mix)]
    return transition_adapter(u, *rows, down, up)


@transition_adapter_row.register_fake
def _(u: Tensor, *arguments: Any) -> Tensor:
    return u.new_empty(u.shape)
