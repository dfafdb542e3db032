"""A key-value cache of integers: quantization of new entries on write, attention that dequantizes in registers.

The layout is that of `loopq::quantize_cache`. At 8 bits a byte is a channel; at 4 bits byte `i` holds channel `i` in
its low half and channel `i + SIZE / 2` in its high half, around 8. A token's head has one scale per `GROUP` channels.
"""

import triton
import triton.language as tl

from loopq_compile.backends.triton.kernels.quantize import MAGIC, in_float32


@triton.jit
def token_scales(tile, smallest, BITS: tl.constexpr, KIND: tl.constexpr):
    """Scales `[ROWS]` of one group each, from `tile` `[ROWS, PARTS, PADDED]`, which is zero outside the group."""
    high = tl.max(tl.max(tile, axis=2), axis=1)
    low = tl.min(tl.min(tile, axis=2), axis=1)
    peak = tl.maximum(high, -low)
    if BITS == 8:
        scale = tl.div_rn(peak, tl.full(peak.shape, 127.0, tl.float32)).to(KIND).to(tl.float32)
        scale = tl.maximum(scale, smallest)
    else:
        scale = tl.maximum((peak * 0.125).to(KIND).to(tl.float32), smallest)
        scale = tl.where(low > -peak, -scale, scale)
    return scale


@triton.jit(
    do_not_specialize=["x_batch", "x_head", "x_token", "count", "heads", "new"],
    do_not_specialize_on_alignment=["x", "codes", "scales"],
)
def write_cache_kernel(
    x,
    codes,
    scales,
    x_batch,
    x_head,
    x_token,
    count,
    heads,
    new,
    smallest,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """`ROWS` tokens of heads: `x` `[batch, heads, new, SIZE]` by strides, to `codes` and `scales` `[batch, heads, new,
    ...]`; `count = batch * heads * new`."""
    PARTS: tl.constexpr = 2 if BITS == 4 else 1
    WIDTH: tl.constexpr = SIZE // PARTS
    GROUPS: tl.constexpr = SIZE // GROUP
    HIGHEST: tl.constexpr = 7 if BITS == 4 else 127
    LOWEST: tl.constexpr = -8 if BITS == 4 else -127
    KIND: tl.constexpr = x.dtype.element_ty
    smallest = in_float32(smallest)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, token = row // new, row % new
    x += (head // heads) * x_batch + (head % heads) * x_head + token * x_token
    part, j = tl.arange(0, PARTS)[None, :, None], tl.arange(0, PADDED)[None, None, :]
    channel = part * WIDTH + j
    inside = (row < count)[:, None, None] & (j < WIDTH)
    tile = tl.load(x[:, None, None] + channel, mask=inside, other=0.0).to(tl.float32)
    divisor = tl.full((ROWS, PARTS, PADDED), 1.0, tl.float32)
    for group in tl.static_range(GROUPS):
        mine = inside & (channel // GROUP == group)
        scale = token_scales(tl.where(mine, tile, 0.0), smallest, BITS, KIND)
        tl.store(scales + row * GROUPS + group, scale.to(KIND), mask=row < count)
        divisor = tl.where(mine, scale[:, None, None], divisor)
    ratio = tl.div_rn(tile, divisor).to(KIND).to(tl.float32)
    ratio = tl.minimum(tl.maximum(ratio, LOWEST), HIGHEST)
    integers = ((ratio + MAGIC) - MAGIC).to(tl.int32)
    if BITS == 4:
        integers = (integers + 8) * (1 + 15 * part)
    stored = tl.sum(integers, axis=1).to(codes.dtype.element_ty)
    byte = tl.arange(0, PADDED)[None, :]
    tl.store(codes + row[:, None] * WIDTH + byte, stored, mask=(row < count)[:, None] & (byte < WIDTH))


@triton.jit
def dequantized(
    codes,
    scales,
    token,
    inside,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Keys or values `[TILE, PADDED]` of `token` `[TILE]`, rounded to the type of their scales."""
    GROUPS: tl.constexpr = SIZE // GROUP
    WIDTH: tl.constexpr = SIZE // 2 if BITS == 4 else SIZE
    KIND: tl.constexpr = scales.dtype.element_ty
    channel = tl.arange(0, PADDED)
    known = inside[:, None] & (channel < SIZE)[None, :]
    bytes = tl.load(codes + token[:, None] * WIDTH + (channel % WIDTH)[None, :], mask=known, other=0)
    if BITS == 4:
        shift = tl.where(channel < WIDTH, 0, 4)
        number = (((bytes.to(tl.int32) >> shift[None, :]) & 15) - 8).to(tl.float32)
    else:
        number = bytes.to(tl.float32)
    if GROUPS == 1:
        scale = tl.load(scales + token, mask=inside, other=0.0)[:, None]
    else:
        scale = tl.load(scales + token[:, None] * GROUPS + (channel // GROUP)[None, :], mask=known, other=0.0)
    return (number * scale.to(tl.float32)).to(KIND)


@triton.jit(
    do_not_specialize=[
        "query_batch",
        "query_head",
        "query_row",
        "mask_batch",
        "mask_head",
        "mask_row",
        "mask_column",
        "heads",
        "repeat",
        "rows",
        "total",
    ],
    do_not_specialize_on_alignment=["query", "keys", "key_scales", "values", "value_scales", "mask", "last"],
)
def attention_kernel(
    query,
    keys,
    key_scales,
    values,
    value_scales,
    mask,
    last,
    sums,
    weights,
    query_batch,
    query_head,
    query_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    heads,
    repeat,
    rows,
    total,
    scale,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Part `program_id(2)` of the columns, for `QUERIES` of the `repeat * rows` queries that read one head.

    For each query, writes `sums` `[parts, batch * heads, repeat * rows, VALUE_SIZE]`, the values weighted by
    `exp(score - largest)`, and `weights` `[2, parts, batch * heads, repeat * rows]`, the largest score and the sum of
    these weights; a part without columns has a largest score of minus infinity. Parts are whole tiles. Their number is
    that of programs, so one compiled kernel serves all lengths. If `last [1]` is given, columns after it are not read,
    and the parts share the columns up to it.
    """
    scale = in_float32(scale)
    cache, part = tl.program_id(0), tl.program_id(2)
    batch, head = cache // heads, cache % heads
    i = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    real = i < repeat * rows
    query_at = batch.to(tl.int64) * query_batch + (head * repeat + i // rows) * query_head + (i % rows) * query_row
    mask_at = batch.to(tl.int64) * mask_batch + (head * repeat + i // rows) * mask_head + (i % rows) * mask_row
    c, v = tl.arange(0, PADDED), tl.arange(0, VALUE_PADDED)
    q = tl.load(query + query_at[:, None] + c[None, :], mask=real[:, None] & (c < SIZE)[None, :], other=0.0)
    seen = total if last is None else tl.minimum(tl.load(last).to(tl.int32) + 1, total)
    share = tl.cdiv(tl.cdiv(seen, TILE), tl.num_programs(2)) * TILE
    end = tl.minimum(part * share + share, seen)
    # One head of the cache has less than 2^31 numbers, so offsets inside it have 32 bits.
    before = cache.to(tl.int64) * total
    keys += before * (SIZE // 2 if BITS == 4 else SIZE)
    key_scales += before * (SIZE // GROUP)
    values += before * (VALUE_SIZE // 2 if BITS == 4 else VALUE_SIZE)
    value_scales += before * (VALUE_SIZE // VALUE_GROUP)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, VALUE_PADDED), tl.float32)
    for begin in range(part * share, end, TILE):
        column = begin + tl.arange(0, TILE)
        inside = column < end
        k = dequantized(keys, key_scales, column, inside, SIZE, GROUP, BITS, PADDED)
        bias_at = mask + mask_at[:, None] + column.to(tl.int64)[None, :] * mask_column
        shown = real[:, None] & inside[None, :]
        bias = tl.load(bias_at, mask=shown, other=0.0).to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        score = tl.where(shown, score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, axis=1))
        # Before any column was read, minus infinity would be subtracted from itself.
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(score - base[:, None])
        shrink = tl.exp(peak - base)
        entries = dequantized(values, value_scales, column, inside, VALUE_SIZE, VALUE_GROUP, BITS, VALUE_PADDED)
        weight = weight * shrink + tl.sum(p, axis=1)
        result = result * shrink[:, None] + tl.dot(p.to(entries.dtype), entries, input_precision=PRECISION)
        peak = top
    place = (part * tl.num_programs(0) + cache).to(tl.int64) * (repeat * rows) + i
    number = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * (repeat * rows)
    tl.store(weights + place, peak, mask=real)
    tl.store(weights + number + place, weight, mask=real)
    tl.store(sums + place[:, None] * VALUE_SIZE + v[None, :], result, mask=real[:, None] & (v < VALUE_SIZE)[None, :])


@triton.jit(do_not_specialize=["parts", "heads", "repeat", "rows"])
def join_parts_kernel(sums, weights, out, parts, heads, repeat, rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Joins the parts of `attention_kernel` for query `program_id(0)`; `out` is `[batch, rows, heads * repeat, SIZE]`.

    Parts are always added in the same order, so results are reproducible to the last bit.
    """
    query, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    v = tl.arange(0, PADDED)
    peak = tl.load(weights + query)
    for part in range(1, parts):
        peak = tl.maximum(peak, tl.load(weights + part * count + query))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((PADDED,), tl.float32)
    weight = tl.zeros((PADDED,), tl.float32)
    for part in range(parts):
        place = part * count + query
        factor = tl.exp(tl.load(weights + place) - base)
        weight += factor * tl.load(weights + parts * count + place)
        total += factor * tl.load(sums + place * SIZE + v, mask=v < SIZE, other=0.0)
    total = tl.where(weight > 0, total / weight, 0.0)
    cache, i = query // (repeat * rows), query % (repeat * rows)
    head = (cache % heads) * repeat + i // rows
    place = ((cache // heads) * rows + i % rows) * (heads * repeat) + head
    tl.store(out + place * SIZE + v, total.to(out.dtype.element_ty), mask=v < SIZE)
