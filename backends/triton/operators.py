"""Launches the kernels: `loopq_triton::quantize_packed`, `loopq_triton::packed_linear`,
`loopq_triton::transition_adapter_row`, with the signatures and meanings of the `loopq::` operators of these names.

They are registered with `torch.library.triton_op`, so `torch.compile` sees the kernels and CUDA graphs capture them. On
tensors that are not on a GPU they run only in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from loopq_compile.backends.triton.configurations import WIDEST_FACTORED, linear_tile, row_warps
from loopq_compile.backends.triton.kernels.adapter import adapter_kernel
from loopq_compile.backends.triton.kernels.linear import linear_kernel, sum_parts_kernel
from loopq_compile.backends.triton.kernels.quantize import quantize_kernel
from loopq_compile.operators.adapter import EPSILON
from loopq_compile.operators.packed import PACKED
from loopq_compile.operators.quantize import smallest_scale

INTERPRETED = not isinstance(linear_kernel, triton.runtime.JITFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1: kernels run on the CPU, slowly."""
TRANSFORM_PRECISION = "tf32x3"
"""How transforms are multiplied on tensor cores: three tf32 products, about as exact as float32."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _launcher(kernel: Any) -> Any:
    return kernel if INTERPRETED else wrap_triton(kernel)


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of tokens, features side by side; no copy for slices of the last dimension."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_constants(
    width: int, group_size: int, columns: int, factors: tuple[int, int] | None, bits: int, limit: int, work: Any
) -> dict[str, Any]:
    """The constants of `quantize_kernel` that follow from shapes."""
    d1, d2 = factors or (width // group_size, group_size)
    least = 16 if factors else 1
    p1, p2 = (max(least, triton.next_power_of_2(size)) for size in (d1, d2))
    return {
        "WIDTH": width,
        "GROUP": group_size,
        "COLUMNS": columns,
        "D1": d1,
        "D2": d2,
        "P1": p1,
        "P2": p2,
        "BITS": bits,
        "LIMIT": limit,
        "HAS_FACTORS": factors is not None,
        "WORK": work,
        "STEP": 32 if factors and p1 * p2 > WIDEST_FACTORED else 0,
        "PRECISION": "ieee" if INTERPRETED else TRANSFORM_PRECISION,
    }


@triton_op("loopq_triton::quantize_packed", mutates_args=())
def quantize_packed(
    x: Tensor,
    up: Tensor | None,
    gain: Tensor | None,
    eps: float | None,
    diagonal: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    table: Tensor,
    loop: int,
    group_size: int,
    bits: int,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """See `loopq_compile.operators.packed.quantize_packed`."""
    rows, others = as_rows(x), None if up is None else as_rows(up)
    count, width = rows.shape
    work = x.dtype if diagonal is None else torch.promote_types(x.dtype, diagonal.dtype)
    factors = None if left is None or right is None else (left.shape[-1], right.shape[-1])
    constants = row_constants(width, group_size, table.shape[-1], factors, bits, limit, _TYPES[work])
    packed = bits <= 4
    code_type, code_width = (PACKED, width // 2) if packed else (torch.int8, width)
    codes = torch.empty((*x.shape[:-1], code_width), dtype=code_type, device=x.device)
    scales = torch.empty((*x.shape[:-1], width // group_size), dtype=torch.float32, device=x.device)
    through_memory = constants["D2"] != constants["P2"] or constants["STEP"]
    scratch = torch.empty((count, width), dtype=torch.float32, device=x.device) if through_memory else scales
    _launcher(quantize_kernel)[(count,)](
        rows,
        rows if others is None else others,
        table if gain is None else gain,
        table if diagonal is None else diagonal,
        table if left is None else left,
        table if right is None else right,
        table,
        codes,
        scales,
        scratch,
        rows.stride(0),
        0 if others is None else others.stride(0),
        loop,
        1 if diagonal is None else diagonal.shape[0],
        1 if left is None else left.shape[0],
        table.shape[0],
        0.0 if eps is None else eps,
        smallest_scale(work),
        HAS_UP=up is not None,
        HAS_NORM=eps is not None,
        HAS_GAIN=gain is not None,
        HAS_DIAGONAL=diagonal is not None,
        num_warps=row_warps(constants["P1"] * constants["P2"]),
        **constants,
    )
    return codes, scales


@triton_op("loopq_triton::packed_linear", mutates_args=())
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
    """See `loopq_compile.operators.packed.packed_linear`."""
    groups, columns = weight_scale.shape[-2:]
    rows = codes.numel() // codes.shape[-1]
    tile = linear_tile(rows, columns, groups)
    out = torch.empty((*codes.shape[:-1], columns), dtype=dtype, device=codes.device)
    target = out
    if tile.split > 1:
        target = torch.empty((tile.split, rows, columns), dtype=torch.float32, device=codes.device)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _launcher(linear_kernel)[(programs, tile.split)](
        codes,
        scale,
        weight,
        weight_scale,
        scale if bias is None else bias,
        target,
        rows,
        columns,
        row,
        weight.shape[0],
        GROUPS=groups,
        GROUP=group_size,
        PACKED_CODES=codes.dtype == PACKED,
        PACKED_WEIGHT=weight.dtype == PACKED,
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        SPLIT=tile.split,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.split > 1:
        _launcher(sum_parts_kernel)[(rows, triton.cdiv(columns, 256))](
            target,
            scale if bias is None else bias,
            out,
            rows,
            columns,
            HAS_BIAS=bias is not None,
            SPLIT=tile.split,
            COLUMNS=256,
            num_warps=1,
        )
    return out


@triton_op("loopq_triton::transition_adapter_row", mutates_args=())
def transition_adapter_row(
    u: Tensor, gate: Tensor, gain: Tensor, shift: Tensor, mix: Tensor, down: Tensor, up: Tensor, loop: int
) -> Tensor:
    """See `loopq_compile.operators.packed.transition_adapter_row`."""
    rows = as_rows(u)
    count, width = rows.shape
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    _launcher(adapter_kernel)[(count,)](
        rows,
        gate,
        gain,
        shift,
        mix,
        down,
        up,
        out,
        rows.stride(0),
        loop,
        gate.shape[0],
        EPSILON,
        WIDTH=width,
        RANK=down.shape[1],
        PADDED_RANK=triton.next_power_of_2(down.shape[1]),
        BLOCK=min(512, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return out
