"""Triton code that the attention kernels share: rows of heads, tables, masks, scores.

Each program keeps an outer tile of one head in registers and visits its inner tiles
(:mod:`dcp.runtime.kernels.tile_table`): runs of full ones without any mask arithmetic, then partly
masked ones. There is one program for each (outer tile, head), longest first: a loop over several
costs registers. Products are summed in float32; exponentials are
powers of two.

Buffers are contiguous: q-like ``[rows, heads, HEAD_DIM]``, out-like ``[rows, heads, VALUE_DIM]``,
kv-like ``[rows, 2, kv_heads, HEAD_DIM]`` or, where the widths differ, ``[rows, kv_heads, HEAD_DIM +
VALUE_DIM]``, lse-like ``[rows, heads]``. ``D`` and ``DV`` are HEAD_DIM and VALUE_DIM padded to a
power of two. A tile of queries holds PACK heads of each row, side by side. An inner tile of the
table is visited in REPEAT parts. DESCRIBED: full tiles are loaded through tensor descriptors.
``UPCAST`` computes products of half-precision inputs in float32, for Triton's interpreter.

A weight of 0 times NaN is NaN: in masked tiles, inner rows that would be multiplied by weights and
are not finite are loaded as 0, and their pairs that count are NaN instead.
"""

# Types would say nothing here: the compiler gives arguments theirs.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WIDTH = tl.constexpr(8)  # numbers of a row in every table


# --------------------------------------------------------------------------- rows of heads


@triton.jit
def _lines(count: tl.constexpr, num_heads, PACK: tl.constexpr):
    """Of each line of a tile: how many heads' places it lies behind the tile's first."""
    line = tl.arange(0, count)
    if PACK == 1:
        return line * num_heads
    return line // PACK * num_heads + line % PACK


@triton.jit
def _row_numbers(start, count: tl.constexpr, PACK: tl.constexpr):
    """The row of each line of a tile."""
    line = tl.arange(0, count)
    return start + (line if PACK == 1 else line // PACK)


@triton.jit
def _pointers(
    base, start, count: tl.constexpr, head, num_heads,
    STRIDE: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr = 1,
):  # fmt: skip
    """Pointers to a tile ``[count, D]`` from row ``start`` and ``head`` on, heads STRIDE numbers
    apart; only the first address needs 64 bits."""
    first = base + (start.to(tl.int64) * num_heads + head) * STRIDE
    return first + (_lines(count, num_heads, PACK)[:, None] * STRIDE + tl.arange(0, D)[None, :])


@triton.jit
def _load(
    base, start, count: tl.constexpr, head, num_heads, keep,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
    PACK: tl.constexpr = 1,
):  # fmt: skip
    """A tile ``[count, D]`` of lines of WIDTH numbers; zero where not kept. ``keep`` None: all are
    kept."""
    at = _pointers(base, start, count, head, num_heads, STRIDE, D, PACK)
    if keep is None:
        if D == WIDTH:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(tl.arange(0, D) < WIDTH)[None, :], other=0.0)
    elif D == WIDTH:
        x = tl.load(at, mask=keep[:, None], other=0.0)
    else:
        x = tl.load(at, mask=keep[:, None] & (tl.arange(0, D) < WIDTH)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _load_pair(
    kv, start, count: tl.constexpr, kv_head, kv_heads, keep,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys and values of one head."""
    if HEAD_DIM == VALUE_DIM:
        k = _load(kv, start, count, kv_head, 2 * kv_heads, keep, HEAD_DIM, HEAD_DIM, D, UPCAST)
        v = _load(
            kv, start, count, kv_heads + kv_head, 2 * kv_heads, keep, HEAD_DIM, HEAD_DIM, D, UPCAST
        )
    else:
        BOTH: tl.constexpr = HEAD_DIM + VALUE_DIM
        k = _load(kv, start, count, kv_head, kv_heads, keep, BOTH, HEAD_DIM, D, UPCAST)
        v = _load(kv + HEAD_DIM, start, count, kv_head, kv_heads, keep, BOTH, VALUE_DIM, DV, UPCAST)
    return k, v


@triton.jit
def _descriptor(base, width, ROWS: tl.constexpr, D: tl.constexpr):
    """A descriptor of tiles ``[ROWS, D]`` of contiguous rows of ``width`` numbers, as many as one
    likes: full tiles have none beyond a buffer's end."""
    return tl.make_tensor_descriptor(
        base, shape=[1 << 30, width], strides=[width, 1], block_shape=[ROWS, D]
    )


@triton.jit
def _load_described(source, start, head, D: tl.constexpr, UPCAST: tl.constexpr):
    """A full tile of one head."""
    x = source.load([start, head * D])
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _load_full_pair(
    kv, start, count: tl.constexpr, kv_head, kv_heads,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    UPCAST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Keys and values of one head, of rows that all count; ``kv`` may be a descriptor."""
    if DESCRIBED:
        k = _load_described(kv, start, kv_head, D, UPCAST)
        v = _load_described(kv, start, kv_heads + kv_head, D, UPCAST)
    else:
        k, v = _load_pair(
            kv, start, count, kv_head, kv_heads, None, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
        )
    return k, v


@triton.jit
def _load_numbers(
    base, start, count: tl.constexpr, head, num_heads, keep, other, PACK: tl.constexpr = 1
):
    """One number a line: log-sum-exps, deltas."""
    at = base + start.to(tl.int64) * num_heads + head + _lines(count, num_heads, PACK)
    return tl.load(at) if keep is None else tl.load(at, mask=keep, other=other)


@triton.jit
def _add(
    base, start, count: tl.constexpr, head, num_heads, keep, x,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr = 1,
):  # fmt: skip
    """Add ``x`` to lines that no other program touches."""
    at = _pointers(base, start, count, head, num_heads, STRIDE, D, PACK)
    mask = keep[:, None] & (tl.arange(0, D) < WIDTH)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + x, mask=mask)


@triton.jit
def _finite(x):
    """A tile with 0 in the lines where a number is not finite, and NaN for each such line, 0 for
    the others."""
    wide = x.to(tl.float32)
    fault = tl.sum(wide - wide, 1)
    return tl.where((fault == 0.0)[:, None], x, 0.0).to(x.dtype), fault


# --------------------------------------------------------------------------- tables and masks


@triton.jit
def _outer_tile(table, tiles_at, number, OUTER: tl.constexpr, PACK: tl.constexpr = 1):
    """A tile's place in the table, its first row, which of its lines are used, its first result."""
    tile = table + tiles_at + number * WIDTH
    used = _row_numbers(0, OUTER, PACK) < tl.load(tile + 1)
    return tile, tl.load(tile), used, tl.load(tile + 2)


@triton.jit
def _in_band(band, outer, inner):
    """Pairs ``[outer, inner]`` and inner rows of one band, and its row shift. Each outer row sees
    a run of inner rows: two comparisons a pair."""
    first = tl.maximum(outer + tl.load(band + 5), tl.load(band + 3))
    last = tl.minimum(outer + tl.load(band + 6), tl.load(band + 4) - 1)
    in_outer = (outer >= tl.load(band + 1)) & (outer < tl.load(band + 2))
    last = tl.where(in_outer, last, -1)
    keep = (inner[None, :] >= first[:, None]) & (inner[None, :] <= last[:, None])
    seen = (inner >= tl.load(band + 3)) & (inner < tl.load(band + 4))
    return keep, seen, tl.load(band + 7)


# --------------------------------------------------------------------------- scores


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634)) + 1.0)


@triton.jit
def _unit(scale, softcap, SOFTCAP: tl.constexpr):
    """What the scores of :func:`_scores` are multiplied by to be exponents of two; positive."""
    return (softcap if SOFTCAP else scale) * LOG2E


@triton.jit
def _scores(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores of a and b in their unit, and the soft-cap's slope."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    slope = s
    if SOFTCAP:
        s = _tanh(s * (scale / softcap))
        slope = 1.0 - s * s
    return s, slope
