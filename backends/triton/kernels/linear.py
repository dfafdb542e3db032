"""The integer matrix product `y = (codes * scale) (weight * weight_scale)ᵀ + bias` on packed codes.

One group is one step along k: an int8 product on tensor cores, exact in int32. Its result is multiplied by the scales
of the group and summed in float32. Two details keep the step short:

- A 4-bit code is not sign-extended. In the high half of its byte it is 16 times the code; the scale absorbs the factor
  (1/16 or 1/256, exact).
- The integer product starts at the bit pattern of 1.5 * 2^23, so its result, read as a float, is that number plus the
  sum. A subtraction converts it; the conversion instruction would run at a quarter of the rate. Sums stay below 2^22
  for groups of up to 128 codes of 8 bits.
"""

import triton
import triton.language as tl

BITS_OF_MAGIC = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def unpack(bytes):
    """`[n, GROUP / 2]` bytes as `[n, GROUP]` int8, 16 times the codes."""
    low = (bytes << 4).to(tl.int8, bitcast=True)
    high = (bytes & 0xF0).to(tl.int8, bitcast=True)
    return tl.reshape(tl.join(low, high), (bytes.shape[0], bytes.shape[1] * 2))


@triton.jit
def tile_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which tile a program computes. Tiles that run at the same time are neighbours: 8 along the rows share weights."""
    number = tl.program_id(0)
    high, wide = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band = number // (8 * wide)
    size = tl.minimum(high - band * 8, 8)
    return band * 8 + (number % (8 * wide)) % size, (number % (8 * wide)) // size


@triton.jit
def group_sums(a, w, start, PACKED_CODES: tl.constexpr, PACKED_WEIGHT: tl.constexpr):
    """The integer product of one group `a wᵀ` as float32, times 16 for each side that is packed."""
    if PACKED_CODES:
        a = unpack(a)
    if PACKED_WEIGHT:
        w = unpack(w)
    return tl.dot(a, tl.trans(w), acc=start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - MAGIC


@triton.jit(do_not_specialize=["rows", "row", "weight_rows"])
def linear_kernel(
    codes,
    scales,
    weight,
    weight_scales,
    bias,
    out,
    rows,
    columns,
    row,
    weight_rows,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile `[ROWS, COLUMNS]` of the result; with `SPLIT > 1` only for the part of the groups given by
    `program_id(1)`.

    `codes` `[rows, K]` or packed `[rows, K / 2]`, `scales` `[rows, GROUPS]`, `weight` `[R, GROUPS, columns, GROUP]` or
    packed, `weight_scales` `[R, GROUPS, columns]`; `out` `[rows, columns]`, or float32 `[SPLIT, rows, columns]`.
    """
    PACKED_CODES: tl.constexpr = codes.dtype.element_ty == tl.uint8
    PACKED_WEIGHT: tl.constexpr = weight.dtype.element_ty == tl.uint8
    STEP_A: tl.constexpr = GROUP // 2 if PACKED_CODES else GROUP
    STEP_W: tl.constexpr = GROUP // 2 if PACKED_WEIGHT else GROUP
    FACTOR: tl.constexpr = (0.0625 if PACKED_CODES else 1.0) * (0.0625 if PACKED_WEIGHT else 1.0)
    SHARE: tl.constexpr = (GROUPS + SPLIT - 1) // SPLIT
    along, across = tile_of(rows, columns, ROWS, COLUMNS)
    m, n = along * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * SHARE
    chosen = tl.minimum(row, weight_rows - 1).to(tl.int64) * GROUPS + first
    a_at = codes + (m.to(tl.int64)[:, None] * GROUPS + first) * STEP_A + tl.arange(0, STEP_A)[None, :]
    scale_at = scales + m.to(tl.int64) * GROUPS + first
    w_at = weight + chosen * columns * STEP_W + n[:, None] * STEP_W + tl.arange(0, STEP_W)[None, :]
    weight_scale_at = weight_scales + chosen * columns + n
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    start = tl.full((ROWS, COLUMNS), BITS_OF_MAGIC, tl.int32)
    for _ in tl.range(first, tl.minimum(first + SHARE, GROUPS), num_stages=STAGES):
        a = tl.load(a_at, mask=m[:, None] < rows, other=0)
        w = tl.load(w_at, mask=n[:, None] < columns, other=0)
        scale = tl.load(scale_at, mask=m < rows, other=0.0)
        weight_scale = tl.load(weight_scale_at, mask=n < columns, other=0.0) * FACTOR
        sums = group_sums(a, w, start, PACKED_CODES, PACKED_WEIGHT)
        total += sums * (scale[:, None] * weight_scale[None, :])
        a_at += STEP_A
        scale_at += 1
        w_at += columns * STEP_W
        weight_scale_at += columns
    if SPLIT > 1:
        out += tl.program_id(1).to(tl.int64) * rows * columns
    elif bias is not None:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    tl.store(out + m.to(tl.int64)[:, None] * columns + n[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def sum_parts_kernel(parts, bias, out, rows, columns, SPLIT: tl.constexpr, COLUMNS: tl.constexpr):
    """`out[m, n] = Σ parts[:, m, n] + bias[n]`, always in the same order, so results are reproducible."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(SPLIT):
        total += tl.load(parts + (part * rows + m) * columns + n, mask=n < columns, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    tl.store(out + m * columns + n, total.to(out.dtype.element_ty), mask=n < columns)
