"""Launches the kernels: `loopq_triton::quantize_packed`, `packed_linear`, `transition_adapter_row`, and for caches of
integers `quantize_cache` and `cached_attention`, with schemas and meanings of the `loopq::` operators of these names.

They are registered with `torch.library.triton_op`, so `torch.compile` sees the kernels and CUDA graphs capture them. On
tensors that are not on a GPU they run only in Triton's interpreter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from loopq_compile.backends.triton.configurations import (
    DECODE_ROWS,
    attention_parts,
    attention_tile,
    linear_tile,
    row_warps,
    transform_step,
)
from loopq_compile.backends.triton.kernels.adapter import adapter_kernel
from loopq_compile.backends.triton.kernels.cache import attention_kernel, join_parts_kernel, write_cache_kernel
from loopq_compile.backends.triton.kernels.linear import linear_kernel, sum_parts_kernel
from loopq_compile.backends.triton.kernels.quantize import quantize_kernel
from loopq_compile.operators import ops
from loopq_compile.operators.adapter import EPSILON
from loopq_compile.operators.cache import attention_like, cached_attention_definition
from loopq_compile.operators.packed import quantized_like
from loopq_compile.operators.quantize import smallest_scale

INTERPRETED = not isinstance(linear_kernel, triton.runtime.JITFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1: kernels run on the CPU, slowly."""
TRANSFORM_PRECISION = "tf32x3"
"""How transforms are multiplied on tensor cores: three tf32 products, about as precise as float32."""
SUM_COLUMNS, ADAPTER_WARPS = 256, 4
ATTENTION_QUERIES, ATTENTION_STAGES = 16, 2
"""Query heads and rows that a program of the attention kernel computes together: the fewest that tensor cores
accept."""
CACHE_TILE, CACHE_WARPS = 512, 4
"""Numbers that a program quantizes for a cache."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launcher(kernel: Any) -> Any:
    """Returns what launches `kernel`; `launches` replaces this by a recorder."""
    return kernel if INTERPRETED else wrap_triton(kernel)


@functools.cache
def architecture_of(device: torch.device) -> int | None:
    """Compute capability times ten of a CUDA device, None for others; `launches` replaces this function."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of tokens, features side by side; no copy for slices of the last dimension."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def side_by_side(*tensors: Tensor | None) -> list[Any]:
    """Contiguous tensors, as kernels read them; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def of_one_length(*tables: Tensor) -> list[Tensor]:
    """Expands tables of which a kernel reads the same row; a table with one row has it for all loops."""
    count = max(len(table) for table in tables)
    return [table.expand(count, *table.shape[1:]).contiguous() for table in tables]


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
        "WORK": work,
        "STEP": transform_step(p1, p2) if factors else 0,
        "PRECISION": "ieee" if INTERPRETED else TRANSFORM_PRECISION,
    }


def _same_schema(name: str) -> Any:
    """Registers a function as `loopq_triton::NAME`, with the schema of `loopq::NAME`.

    The function needs annotations all the same: torch 2.11 reads them even where a schema is given.
    """
    schema = str(getattr(ops, name).default._schema)
    return triton_op(f"loopq_triton::{name}", mutates_args=(), schema=schema[schema.index("(") :])


def adapter_constants(width: int, rank: int) -> dict[str, int]:
    """The constants of `adapter_kernel`."""
    block = min(512, triton.next_power_of_2(width))
    return {"WIDTH": width, "RANK": rank, "PADDED_RANK": triton.next_power_of_2(rank), "BLOCK": block}


@_same_schema("quantize_packed")
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
    """See `loopq_compile.operators.packed.quantize_packed`."""
    rows, others = as_rows(x), None if up is None else as_rows(up)
    count, width = rows.shape
    work = x.dtype if diagonal is None else torch.promote_types(x.dtype, diagonal.dtype)
    factors = None if left is None or right is None else (left.shape[-1], right.shape[-1])
    constants = row_constants(width, group_size, table.shape[-1], factors, bits, limit, _TYPES[work])
    codes, scales = quantized_like(x, group_size, bits)
    through_memory = constants["D2"] != constants["P2"] or constants["STEP"]
    scratch = torch.empty((count, width), dtype=torch.float32, device=x.device) if through_memory else None
    strides = rows.stride(0), 0 if others is None else others.stride(0)
    gain, shift, diagonal, table = side_by_side(gain, shift, diagonal, table)
    if left is not None and right is not None:
        left, right = of_one_length(left, right)
    lengths = [1 if table is None else table.shape[0] for table in (diagonal, left, table)]
    launcher(quantize_kernel)[(count,)](
        *(rows, others, gain, shift, diagonal, left, right, table, codes, scales, scratch),
        *strides,
        loop,
        *lengths,
        eps,
        smallest_scale(work),
        ACTIVATION=activation,
        NORM=norm,
        num_warps=row_warps(constants["P1"] * constants["P2"]),
        **constants,
    )
    return codes, scales


@_same_schema("packed_linear")
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
    tile = linear_tile(rows, columns, groups, architecture_of(codes.device), group_size)
    out = torch.empty((*codes.shape[:-1], columns), dtype=dtype, device=codes.device)
    target = out
    if tile.split > 1:
        target = torch.empty((tile.split, rows, columns), dtype=torch.float32, device=codes.device)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    launcher(linear_kernel)[(programs, tile.split)](
        *side_by_side(codes, scale, weight, weight_scale, None if tile.split > 1 else bias),
        target,
        *(rows, columns, row, weight.shape[0]),
        GROUPS=groups,
        GROUP=group_size,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        SPLIT=tile.split,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.split > 1:
        launcher(sum_parts_kernel)[(rows, triton.cdiv(columns, SUM_COLUMNS))](
            *(target, *side_by_side(bias), out), rows, columns, SPLIT=tile.split, COLUMNS=SUM_COLUMNS, num_warps=1
        )
    return out


@_same_schema("transition_adapter_row")
def transition_adapter_row(
    u: Tensor, gate: Tensor, gain: Tensor, shift: Tensor, mix: Tensor, down: Tensor, up: Tensor, loop: int
) -> Tensor:
    """See `loopq_compile.operators.packed.transition_adapter_row`."""
    rows = as_rows(u)
    count, width = rows.shape
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    gate, gain, shift, mix = of_one_length(gate, gain, shift, mix)
    down, up = side_by_side(down, up)
    launcher(adapter_kernel)[(count,)](
        *(rows, gate, gain, shift, mix, down, up, out),
        *(rows.stride(0), loop, gate.shape[0], EPSILON),
        **adapter_constants(width, down.shape[1]),
        num_warps=ADAPTER_WARPS,
    )
    return out


def write_constants(size: int, group_size: int, bits: int) -> dict[str, int]:
    """The constants of `write_cache_kernel`."""
    parts = 2 if bits == 4 else 1
    padded = triton.next_power_of_2(size // parts)
    return {
        "SIZE": size,
        "GROUP": group_size,
        "BITS": bits,
        "ROWS": max(1, CACHE_TILE // (parts * padded)),
        "PADDED": padded,
    }


@_same_schema("quantize_cache")
def quantize_cache(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """See `loopq_compile.operators.cache.quantize_cache`."""
    *leading, size = x.shape
    codes_type, width = (torch.int8, size) if bits == 8 else (torch.uint8, size // 2)
    codes = torch.empty((*leading, width), dtype=codes_type, device=x.device)
    scale = torch.empty((*leading, size // group_size), dtype=x.dtype, device=x.device)
    rows = x if x.ndim == 4 else x.reshape(1, 1, -1, size)
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    batch, heads, new, _ = rows.shape
    constants, count = write_constants(size, group_size, bits), batch * heads * new
    if count > 0:
        launcher(write_cache_kernel)[(triton.cdiv(count, constants["ROWS"]),)](
            *(rows, codes, scale, *rows.stride()[:3], count, heads, new, smallest_scale(x.dtype)),
            **constants,
            num_warps=CACHE_WARPS,
        )
    return codes, scale


def attention_constants(
    size: int, groups: int, value_size: int, value_groups: int, bits: int, element_size: int
) -> dict[str, Any]:
    """The constants of `attention_kernel`, for keys and values of `element_size` bytes a number."""
    padded = max(16, triton.next_power_of_2(size))
    value_padded = max(16, triton.next_power_of_2(value_size))
    return {
        "SIZE": size,
        "GROUP": size // groups,
        "VALUE_SIZE": value_size,
        "VALUE_GROUP": value_size // value_groups,
        "BITS": bits,
        "PADDED": padded,
        "VALUE_PADDED": value_padded,
        "QUERIES": ATTENTION_QUERIES,
        "TILE": attention_tile(max(padded, value_padded), element_size),
        "PRECISION": "ieee" if INTERPRETED else TRANSFORM_PRECISION,
    }


def attention_warps(constants: dict[str, Any]) -> int:
    """Warps of a program of `attention_kernel`, found by compiling: with other numbers some architectures spill."""
    return 8 if max(constants["PADDED"], constants["VALUE_PADDED"]) <= 128 else 4


@_same_schema("cached_attention")
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
    """See `loopq_compile.operators.cache.cached_attention`. Prompts of more than `DECODE_ROWS` rows are computed by the
    definition, since PyTorch's own kernels are faster there."""
    batch, queries, rows, size = query.shape
    heads, total = key.shape[1:3]
    if rows > DECODE_ROWS:
        return cached_attention_definition(query, key, key_scale, value, value_scale, mask, bits, scale)
    query = query if query.stride(3) == 1 else query.contiguous()
    mask = mask.expand(batch, queries, rows, total)
    stored = [tensor.contiguous() for tensor in (key, key_scale, value, value_scale)]
    out = attention_like(query, value, bits)
    repeat, value_size = queries // heads, out.shape[-1]
    groups, value_groups = key_scale.shape[-1], value_scale.shape[-1]
    constants = attention_constants(size, groups, value_size, value_groups, bits, query.element_size())
    caches, blocks = batch * heads, triton.cdiv(repeat * rows, ATTENTION_QUERIES)
    parts = attention_parts(caches * blocks, total)
    sums = torch.empty((parts, caches * repeat * rows, value_size), dtype=torch.float32, device=query.device)
    weights = torch.empty((2, parts, caches * repeat * rows), dtype=torch.float32, device=query.device)
    launcher(attention_kernel)[(caches, blocks, parts)](
        *(query, *stored, mask, last, sums, weights),
        *query.stride()[:3],
        *mask.stride(),
        *(heads, repeat, rows, total, scale),
        **constants,
        num_warps=attention_warps(constants),
        num_stages=ATTENTION_STAGES,
    )
    launcher(join_parts_kernel)[(caches * repeat * rows,)](
        *(sums, weights, out, parts, heads, repeat, rows),
        SIZE=value_size,
        PADDED=constants["VALUE_PADDED"],
        num_warps=1,
    )
    return out
