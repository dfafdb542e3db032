"""SwiGLU or RMS norm, transform, and quantization of one token in one program.

The token stays in registers as a tile. Without a transform the tile is `[groups, GROUP]`, with one `[D1, D2]`, and
`leftᵀ X right` are two products; wide tiles (`STEP > 0`) go through memory and are multiplied in steps along k, since
factors and tile together do not fit registers. For the groups the tile is then read as one long row; where `D2` is no
power of two the tile has gaps, and the row goes through memory too. What a program wrote it finds in its cache.

Rounding is that of the definition: quotients by IEEE division, ties to even. Between steps, numbers are rounded to the
type that the definition has there (`WORK`).
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a number below 2^22 in magnitude it rounds to the nearest integer, ties to even."""


@triton.jit
def pick_row(loop, rows):
    """The row of a per-loop table: the last one for loops beyond its end."""
    return tl.minimum(loop, rows - 1).to(tl.int64)


@triton.jit
def transformed(tile, left, right, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr):
    """`leftᵀ tile right` of a zero-padded tile `[P1, P2]`; left `[D1, D1]`, right `[D2, D2]` in memory."""
    P1: tl.constexpr = tile.shape[0]
    P2: tl.constexpr = tile.shape[1]
    i, j = tl.arange(0, P2)[:, None], tl.arange(0, P2)[None, :]
    factor = tl.load(right + i * D2 + j, mask=(i < D2) & (j < D2), other=0.0).to(tl.float32)
    tile = tl.dot(tile, factor, input_precision=PRECISION)
    # Read turned round: entry (i, j) of the tile on the left is left[j, i].
    i, j = tl.arange(0, P1)[:, None], tl.arange(0, P1)[None, :]
    factor = tl.load(left + j * D1 + i, mask=(i < D1) & (j < D1), other=0.0).to(tl.float32)
    return tl.dot(factor, tile, input_precision=PRECISION)


@triton.jit
def transformed_in_steps(
    scratch,
    left,
    right,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for a tile `[D1, D2]` that lies in memory at `scratch`, which is overwritten."""
    i, j, k = tl.arange(0, P1)[:, None], tl.arange(0, P2)[None, :], tl.arange(0, STEP)
    total = tl.zeros((P1, P2), tl.float32)
    for begin in range(0, D2, STEP):
        across, down = begin + k[None, :], begin + k[:, None]
        part = tl.load(scratch + i * D2 + across, mask=(i < D1) & (across < D2), other=0.0)
        factor = tl.load(right + down * D2 + j, mask=(down < D2) & (j < D2), other=0.0).to(tl.float32)
        total = tl.dot(part, factor, acc=total, input_precision=PRECISION)
    tl.debug_barrier()
    tl.store(scratch + i * D2 + j, total, mask=(i < D1) & (j < D2))
    tl.debug_barrier()
    total = tl.zeros((P1, P2), tl.float32)
    for begin in range(0, D1, STEP):
        across, down = begin + k[None, :], begin + k[:, None]
        factor = tl.load(left + across * D1 + i, mask=(i < D1) & (across < D1), other=0.0).to(tl.float32)
        part = tl.load(scratch + down * D2 + j, mask=(down < D1) & (j < D2), other=0.0)
        total = tl.dot(factor, part, acc=total, input_precision=PRECISION)
    tl.debug_barrier()
    return total


@triton.jit
def group_scales(groups, entries, smallest, LIMIT: tl.constexpr, WORK: tl.constexpr):
    """Scales `[G]` of `groups` `[G, GROUP]`: the entries of the table, or `entries * peak / LIMIT`."""
    if LIMIT == 0:
        return entries
    if LIMIT > 0:
        peak = tl.max(tl.abs(groups), axis=1)
    else:
        high, low = tl.max(groups, axis=1), tl.min(groups, axis=1)
        peak = tl.where(high > -low, high, low)
    limit = tl.full(entries.shape, LIMIT, tl.float32)
    scale = (peak * tl.div_rn(entries, limit)).to(WORK).to(tl.float32)
    return tl.where(tl.abs(scale) < smallest, smallest, scale)


@triton.jit
def rounded(groups, scale, BITS: tl.constexpr):
    """Codes int8 of `groups` `[G, GROUP]`."""
    HIGHEST: tl.constexpr = 2 ** (BITS - 1) - 1
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    ratio = tl.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape))
    ratio = tl.minimum(tl.maximum(ratio, LOWEST), HIGHEST)
    return ((ratio + MAGIC) - MAGIC).to(tl.int8)


@triton.jit(do_not_specialize=["loop", "diagonal_rows", "factor_rows", "table_rows"])
def quantize_kernel(
    x,
    up,
    gain,
    diagonal,
    left,
    right,
    table,
    codes,
    scales,
    scratch,
    x_stride,
    up_stride,
    loop,
    diagonal_rows,
    factor_rows,
    table_rows,
    eps,
    smallest,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    BITS: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    WORK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Quantizes row `program_id(0)`.

    The tile is `[P1, P2]` (powers of two) with `[D1, D2]` in use, `D1 * D2 = WIDTH`; without factors `D2 = P2 = GROUP`.
    `COLUMNS` is the number of entries in a row of `table`: groups, or 1.
    """
    GROUPS: tl.constexpr = WIDTH // GROUP
    row = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, P1)[:, None], tl.arange(0, P2)[None, :]
    place, inside = i * D2 + j, (i < D1) & (j < D2)
    tile = tl.load(x + row * x_stride + place, mask=inside, other=0.0)
    KIND: tl.constexpr = tile.dtype
    tile = tile.to(tl.float32)
    if HAS_UP:
        other = tl.load(up + row * up_stride + place, mask=inside, other=0.0).to(tl.float32)
        tile = (tile / (1.0 + tl.exp(-tile))).to(KIND).to(tl.float32)
        tile = (tile * other).to(KIND).to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(tl.sum(tile * tile, axis=1), axis=0) / WIDTH
        tile = tile * tl.rsqrt(mean + eps)
        if HAS_GAIN:
            tile = tile * tl.load(gain + place, mask=inside, other=0.0).to(tl.float32)
        tile = tile.to(KIND).to(tl.float32)
    if HAS_DIAGONAL:
        factor = tl.load(diagonal + pick_row(loop, diagonal_rows) * WIDTH + place, mask=inside, other=0.0)
        tile = (tile * factor.to(tl.float32)).to(WORK).to(tl.float32)
    if HAS_FACTORS:
        turn = pick_row(loop, factor_rows)
        left += turn * D1 * D1
        right += turn * D2 * D2
        if STEP > 0:
            tl.store(scratch + row * WIDTH + place, tile, mask=inside)
            tl.debug_barrier()
            tile = transformed_in_steps(scratch + row * WIDTH, left, right, D1, D2, P1, P2, STEP, PRECISION)
        else:
            tile = transformed(tile, left, right, D1, D2, PRECISION)
        tile = tile.to(WORK).to(tl.float32)
    WHOLE: tl.constexpr = D2 == P2
    COUNT: tl.constexpr = P1 * P2 // GROUP if WHOLE else triton.next_power_of_2(GROUPS)
    if WHOLE:
        groups = tl.reshape(tile, (COUNT, GROUP))
    else:
        tl.store(scratch + row * WIDTH + place, tile, mask=inside)
        tl.debug_barrier()
        g, k = tl.arange(0, COUNT)[:, None], tl.arange(0, GROUP)[None, :]
        groups = tl.load(scratch + row * WIDTH + g * GROUP + k, mask=g < GROUPS, other=0.0)
    g = tl.arange(0, COUNT)
    column = g if COLUMNS > 1 else g * 0
    entries = tl.load(table + pick_row(loop, table_rows) * COLUMNS + column, mask=g < GROUPS, other=1.0)
    scale = group_scales(groups, entries.to(tl.float32), smallest, LIMIT, WORK)
    tl.store(scales + row * GROUPS + g, scale, mask=g < GROUPS)
    integers = rounded(groups, scale, BITS)
    if BITS <= 4:
        HALF: tl.constexpr = GROUP // 2
        low, high = tl.split(tl.reshape(integers, (COUNT, HALF, 2)))
        integers = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
        k = tl.arange(0, HALF)[None, :]
        tl.store(codes + row * (WIDTH // 2) + g[:, None] * HALF + k, integers, mask=g[:, None] < GROUPS)
    else:
        k = tl.arange(0, GROUP)[None, :]
        tl.store(codes + row * WIDTH + g[:, None] * GROUP + k, integers, mask=g[:, None] < GROUPS)
