"""The transition adapter of one token in one program: `u + gate (gain N(u) + shift + (N(u) down * mix) upᵀ)`."""

import triton
import triton.language as tl

from loopq_compile.backends.triton.kernels.quantize import in_float32, pick_row


@triton.jit(do_not_specialize=["loop", "table_rows"])
def adapter_kernel(
    u,
    gate,
    gain,
    shift,
    mix,
    down,
    up,
    out,
    u_stride,
    loop,
    table_rows,
    eps,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row `program_id(0)` of `u` `[rows, WIDTH]`; it is read twice, the second time from cache.

    The norm's factor is one number for the row: the product with `down` runs on `u` itself and is scaled afterwards.
    """
    eps = in_float32(eps)
    row = tl.program_id(0).to(tl.int64)
    table = pick_row(loop, table_rows)
    u += row * u_stride
    r = tl.arange(0, PADDED_RANK)
    squares = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((PADDED_RANK,), tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        values = tl.load(u + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        squares += values * values
        inside = (k[:, None] < WIDTH) & (r[None, :] < RANK)
        factor = tl.load(down + k[:, None] * RANK + r[None, :], mask=inside, other=0.0).to(tl.float32)
        low += tl.sum(values[:, None] * factor, axis=0)
    norm = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)
    low *= norm * tl.load(mix + table * RANK + r, mask=r < RANK, other=0.0).to(tl.float32)
    strength = tl.load(gate + table).to(tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        values = tl.load(u + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        inside = (k[:, None] < WIDTH) & (r[None, :] < RANK)
        factor = tl.load(up + k[:, None] * RANK + r[None, :], mask=inside, other=0.0).to(tl.float32)
        change = tl.load(gain + table * WIDTH + k, mask=k < WIDTH, other=0.0).to(tl.float32) * (values * norm)
        change += tl.load(shift + table * WIDTH + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        change += tl.sum(low[None, :] * factor, axis=1)
        result = (values + strength * change).to(out.dtype.element_ty)
        tl.store(out + row * WIDTH + k, result, mask=k < WIDTH)
