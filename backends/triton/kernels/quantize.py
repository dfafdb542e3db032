"""Activation function or norm, transform, and quantization of one token in one program.

The token stays in registers as a tile: `[groups, GROUP]` without a transform, `[D1, D2]` with one. `leftᵀ X right` is
two products. Wide tiles (`STEP > 0`) go through memory and are multiplied in steps along k, since factors and tile
together do not fit into registers. For the groups, the tile is then read as one long row. If `D2` is not a power of
two, the tile has gaps, and the row goes through memory too. A program finds what it wrote in its cache.

Rounding follows the definition: quotients by IEEE division, ties to even. Between steps, numbers are rounded to the
type that the definition has there (`WORK`).
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a number below 2^22 in magnitude it rounds to the nearest integer, ties to even."""


@triton.jit
def in_float32(number):
    """A scalar argument; `torch.compile` gives Python's numbers as float64."""
    return tl.full((), number, tl.float32)


@triton.jit
def pick_row(loop, rows):
    """The row of a per-loop table: the last one for loops beyond its end."""
    return tl.minimum(loop, rows - 1).to(tl.int64)


@triton.jit
def activated(tile, ACTIVATION: tl.constexpr):
    """SiLU, GELU (`gelu_tanh` is its approximation, `(1 + tanh(y)) / 2` written as a sigmoid), or ReLU of `tile`."""
    if ACTIVATION == "silu":
        tile = tile / (1.0 + tl.exp(-tile))
    elif ACTIVATION == "gelu":
        tile = 0.5 * tile * (1.0 + tl.erf(tile * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        tile = tile / (1.0 + tl.exp(-1.5957691216057308 * (tile + 0.044715 * tile * tile * tile)))
    else:
        tile = tl.maximum(tile, 0.0)
    return tile


@triton.jit
def normed(tile, inside, place, gain, shift, eps, WIDTH: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr):
    """RMS or layer norm of a zero-padded `tile` of `WIDTH` numbers, rounded to `KIND` as the definition does."""
    if NORM == "layer":
        tile = tl.where(inside, tile - tl.sum(tl.sum(tile, axis=1), axis=0) / WIDTH, 0.0)
    tile *= tl.rsqrt(tl.sum(tl.sum(tile * tile, axis=1), axis=0) / WIDTH + eps)
    if NORM == "rms_rounded":
        tile = tile.to(KIND).to(tl.float32)
    if gain is not None:
        tile *= tl.load(gain + place, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        tile += tl.load(shift + place, mask=inside, other=0.0).to(tl.float32)
    return tile.to(KIND).to(tl.float32)


@triton.jit
def prepared(
    tile,
    up,
    up_begin,
    gain,
    shift,
    place,
    inside,
    eps,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
):
    """The loaded `tile` in float32, after its activation function, the other half of a gated one, and its norm."""
    KIND: tl.constexpr = tile.dtype
    tile = tile.to(tl.float32)
    if ACTIVATION != "":
        tile = activated(tile, ACTIVATION).to(KIND).to(tl.float32)
    if up is not None:
        tile *= tl.load(up + up_begin + place, mask=inside, other=0.0).to(tl.float32)
        tile = tile.to(KIND).to(tl.float32)
    if NORM != "":
        tile = normed(tile, inside, place, gain, shift, eps, WIDTH, NORM, KIND)
    return tile


@triton.jit
def in_groups(tile, scratch, begin, place, inside, D2: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """The token as `[groups, GROUP]`, the number of groups rounded up to a power of two."""
    P2: tl.constexpr = tile.shape[1]
    if D2 == P2:
        groups = tl.reshape(tile, (tile.shape[0] * P2 // GROUP, GROUP))
    else:
        scratch += begin
        tl.store(scratch + place, tile, mask=inside)
        tl.debug_barrier()
        g, k = tl.arange(0, triton.next_power_of_2(GROUPS))[:, None], tl.arange(0, GROUP)[None, :]
        groups = tl.load(scratch + g * GROUP + k, mask=g < GROUPS, other=0.0)
    return groups


@triton.jit
def transformed(
    tile,
    scratch,
    begin,
    place,
    inside,
    left,
    right,
    turn,
    D1: tl.constexpr,
    D2: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`leftᵀ tile right` of a zero-padded tile `[P1, P2]`; row `turn` of left `[R, D1, D1]` and right `[R, D2, D2]`."""
    P1: tl.constexpr = tile.shape[0]
    P2: tl.constexpr = tile.shape[1]
    left += turn * D1 * D1
    right += turn * D2 * D2
    if STEP > 0:
        scratch += begin
        tl.store(scratch + place, tile, mask=inside)
        tl.debug_barrier()
        tile = transformed_in_steps(scratch, left, right, D1, D2, P1, P2, STEP, PRECISION)
    else:
        i, j = tl.arange(0, P2)[:, None], tl.arange(0, P2)[None, :]
        factor = tl.load(right + i * D2 + j, mask=(i < D2) & (j < D2), other=0.0).to(tl.float32)
        tile = tl.dot(tile, factor, input_precision=PRECISION)
        # Read transposed: entry (i, j) of the left tile is left[j, i].
        i, j = tl.arange(0, P1)[:, None], tl.arange(0, P1)[None, :]
        factor = tl.load(left + j * D1 + i, mask=(i < D1) & (j < D1), other=0.0).to(tl.float32)
        tile = tl.dot(factor, tile, input_precision=PRECISION)
    return tile


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
    """Like `transformed`, for a tile `[D1, D2]` in memory at `scratch`, which is overwritten."""
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


@triton.jit
def store_quantized(
    groups,
    entries,
    codes,
    scales,
    smallest,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    LIMIT: tl.constexpr,
    WORK: tl.constexpr,
):
    """Writes codes, two to a byte up to 4 bits, and scales of one token; `entries` is its row of the table."""
    g = tl.arange(0, groups.shape[0])
    entry = tl.load(entries + (g if COLUMNS > 1 else g * 0), mask=g < GROUPS, other=1.0).to(tl.float32)
    scale = group_scales(groups, entry, smallest, LIMIT, WORK)
    tl.store(scales + g, scale, mask=g < GROUPS)
    integers = rounded(groups, scale, BITS)
    WIDTH: tl.constexpr = groups.shape[1] // 2 if BITS <= 4 else groups.shape[1]
    if BITS <= 4:
        low, high = tl.split(tl.reshape(integers, (groups.shape[0], WIDTH, 2)))
        integers = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
    tl.store(codes + g[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], integers, mask=g[:, None] < GROUPS)


@triton.jit(do_not_specialize=["loop", "diagonal_rows", "factor_rows", "table_rows"])
def quantize_kernel(
    x,
    up,
    gain,
    shift,
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
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    WORK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Quantizes row `program_id(0)`; steps whose argument is None or "" are skipped.

    The tile is `[P1, P2]` (powers of two) with `[D1, D2]` in use, `D1 * D2 = WIDTH`; without factors `D2 = P2 = GROUP`.
    `COLUMNS` is the number of entries in a row of `table`: groups, or 1.
    """
    GROUPS: tl.constexpr = WIDTH // GROUP
    eps, smallest = in_float32(eps), in_float32(smallest)
    row = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, P1)[:, None], tl.arange(0, P2)[None, :]
    place, inside = i * D2 + j, (i < D1) & (j < D2)
    tile = tl.load(x + row * x_stride + place, mask=inside, other=0.0)
    tile = prepared(tile, up, row * up_stride, gain, shift, place, inside, eps, WIDTH, ACTIVATION, NORM)
    if diagonal is not None:
        factor = tl.load(diagonal + pick_row(loop, diagonal_rows) * WIDTH + place, mask=inside, other=0.0)
        tile = (tile * factor.to(tl.float32)).to(WORK).to(tl.float32)
    if left is not None:
        turn = pick_row(loop, factor_rows)
        tile = transformed(tile, scratch, row * WIDTH, place, inside, left, right, turn, D1, D2, STEP, PRECISION)
        tile = tile.to(WORK).to(tl.float32)
    groups = in_groups(tile, scratch, row * WIDTH, place, inside, D2, GROUP, GROUPS)
    entries = table + pick_row(loop, table_rows) * COLUMNS
    codes += row * (WIDTH // 2 if BITS <= 4 else WIDTH)
    store_quantized(groups, entries, codes, scales + row * GROUPS, smallest, GROUPS, COLUMNS, BITS, LIMIT, WORK)
