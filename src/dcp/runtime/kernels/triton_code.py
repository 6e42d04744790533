"""Triton code of attention over tile tables (:mod:`dcp.runtime.kernels.tile_table`).

Each program keeps an outer tile of one head in registers and visits its inner tiles: runs of full
ones without any mask arithmetic, and single masked ones. There is one program for each (outer tile,
head), longest first: a loop over several costs registers. Products are summed in float32;
exponentials are powers of two. The method is FlashAttention-2's (arXiv 2307.08691), with a start
from an earlier partial result.

Buffers are contiguous: q-like ``[rows, heads, HEAD_DIM]``, out-like ``[rows, heads, VALUE_DIM]``,
kv-like ``[rows, 2, kv_heads, HEAD_DIM]`` or, where the widths differ, ``[rows, kv_heads, HEAD_DIM +
VALUE_DIM]``, lse-like ``[rows, heads]``. ``D`` and ``DV`` are HEAD_DIM and VALUE_DIM padded to a
power of two. ``UPCAST`` computes products of half-precision inputs in float32, for Triton's
interpreter.

A weight of 0 times NaN is NaN: in masked tiles, inner rows that are not finite are loaded as 0, and
their pairs that count are NaN instead.
"""

# Types would say nothing here: the compiler gives arguments theirs.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WIDTH = tl.constexpr(8)  # numbers of a row in every table

# Counts and rows change with every plan: never a reason to compile again.
_VARYING = ["first_tile", "tiles_at", "entries_at", "bands_at"]


@triton.jit
def _rows(base, start, count: tl.constexpr, head, num_heads, STRIDE: tl.constexpr, D: tl.constexpr):
    """Pointers to ``count`` rows of one head from row ``start`` on, ``[count, D]``, heads STRIDE
    numbers apart; only the first address needs 64 bits."""
    first = base + (start.to(tl.int64) * num_heads + head) * STRIDE
    return first + (tl.arange(0, count)[:, None] * (num_heads * STRIDE) + tl.arange(0, D)[None, :])


@triton.jit
def _load(
    base, start, count: tl.constexpr, head, num_heads, keep,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of one head, WIDTH numbers each, ``[count, D]``; zero where not kept. ``keep`` None: all
    are kept."""
    at = _rows(base, start, count, head, num_heads, STRIDE, D)
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
def _finite_rows(a, b):
    """Two tiles with 0 in the rows of which either has a number that is not finite, and NaN for
    each such row, 0 for the others."""
    x, y = a.to(tl.float32), b.to(tl.float32)
    fault = tl.sum(x - x, 1) + tl.sum(y - y, 1)
    good = (fault == 0.0)[:, None]
    return tl.where(good, a, 0.0).to(a.dtype), tl.where(good, b, 0.0).to(b.dtype), fault


@triton.jit
def _load_numbers(base, start, count: tl.constexpr, head, num_heads, keep, other):
    """One number a row: log-sum-exps, deltas."""
    at = base + start.to(tl.int64) * num_heads + head + tl.arange(0, count) * num_heads
    return tl.load(at) if keep is None else tl.load(at, mask=keep, other=other)


@triton.jit
def _add(
    base, start, count: tl.constexpr, head, num_heads, keep, x,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add ``x`` to rows that no other program touches."""
    at = _rows(base, start, count, head, num_heads, STRIDE, D)
    mask = keep[:, None] & (tl.arange(0, D) < WIDTH)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + x, mask=mask)


@triton.jit
def _outer_tile(table, tiles_at, number, OUTER: tl.constexpr):
    """A tile's place in the table, its first row, which of its rows are used, its first result."""
    tile = table + tiles_at + number * WIDTH
    start = tl.load(tile)
    used = tl.arange(0, OUTER) < tl.load(tile + 1)
    return tile, start, used, tl.load(tile + 2)


@triton.jit
def _in_bands(bands, first, count, outer, inner, shift):
    """Union of bands: boolean ``[outer, inner]``; result rows minus rows of the inner side."""
    keep = (outer[:, None] < 0) & (inner[None, :] < 0)
    shifts = inner * 0 + shift
    for band in range(first, first + count):
        at = bands + band * WIDTH
        in_outer = (outer >= tl.load(at)) & (outer < tl.load(at + 1))
        in_inner = (inner >= tl.load(at + 2)) & (inner < tl.load(at + 3))
        difference = inner[None, :] - outer[:, None]
        inside = (difference >= tl.load(at + 4)) & (difference <= tl.load(at + 5))
        keep = keep | (inside & in_outer[:, None] & in_inner[None, :])
        shifts = tl.where(in_inner, tl.load(at + 6), shifts)
    return keep, shifts


@triton.jit
def _masked_tile(bands, at, row, INNER: tl.constexpr):
    """Of one masked entry: first inner row, pairs that count, inner rows in any, and shifts."""
    first = tl.load(at)
    inner = first + tl.arange(0, INNER)
    keep, shifts = _in_bands(bands, tl.load(at + 2), tl.load(at + 3), row, inner, tl.load(at + 4))
    return first, keep, tl.max(keep.to(tl.int32), 0) > 0, shifts


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634)) + 1.0)


@triton.jit
def _scores(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores of a and b in powers of two, and the soft-cap's slope (1 without one)."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    slope = s
    if SOFTCAP:
        bent = _tanh(s * (scale / softcap))
        s = bent * (softcap * LOG2E)
        slope = 1.0 - bent * bent
    else:
        s = s * (scale * LOG2E)
    return s, slope


@triton.jit
def _fold(acc, top, total, s, v):
    """One inner tile into the running (accumulator, maximum, sum): online softmax."""
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q, kv, out, lse, table, first_tile, tiles_at, entries_at, bands_at,
    heads, kv_heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    entries, bands = table + entries_at, table + bands_at
    work = tl.program_id(0)
    head = work % heads
    kv_head = head // (heads // kv_heads)
    tile, start, used, result = _outer_tile(table, tiles_at, first_tile + work // heads, OUTER)
    row = start + tl.arange(0, OUTER)
    q_tile = _load(q, start, OUTER, head, heads, used, HEAD_DIM, HEAD_DIM, D, UPCAST)

    # go on from what earlier divisions left, where they left anything: an output is a sum with
    # weight 1 at its lse
    top = _load_numbers(lse, result, OUTER, head, heads, used, float("-inf")) * LOG2E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    some = top != float("-inf")
    acc = _load(out, result, OUTER, head, heads, some, VALUE_DIM, VALUE_DIM, DV, True)

    for entry in range(tl.load(tile + 3), tl.load(tile + 4)):
        at = entries + entry * WIDTH
        first = tl.load(at)
        for visit in range(tl.load(at + 1)):  # noqa: B007
            k, v = _load_pair(
                kv, first, INNER, kv_head, kv_heads, None, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
            )
            s, _slope = _scores(q_tile, k, scale, softcap, SOFTCAP)
            acc, top, total = _fold(acc, top, total, s, v)
            first += INNER
    for entry in range(tl.load(tile + 4), tl.load(tile + 5)):
        first, keep, seen, _shifts = _masked_tile(bands, entries + entry * WIDTH, row, INNER)
        k, v = _load_pair(
            kv, first, INNER, kv_head, kv_heads, seen, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
        )
        k, v, fault = _finite_rows(k, v)
        s, _slope = _scores(q_tile, k, scale, softcap, SOFTCAP)
        s = tl.where(keep, s + fault[None, :], float("-inf"))
        acc, top, total = _fold(acc, top, total, s, v)

    some = total != 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    at_out = _rows(out, result, OUTER, head, heads, VALUE_DIM, DV)
    tl.store(at_out, acc, mask=used[:, None] & (tl.arange(0, DV) < VALUE_DIM)[None, :])
    new_lse = top * LN2 + tl.log(tl.where(some, total, 1.0))
    at_lse = lse + result.to(tl.int64) * heads + head + tl.arange(0, OUTER) * heads
    tl.store(at_lse, tl.where(some, new_lse, float("-inf")), mask=used)


@triton.jit
def _query_side(
    q, grad_out, lse, delta, start, count: tl.constexpr, head, heads, keep,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Queries and output gradients; log-sum-exps in powers of two, infinite for rows that see
    nothing, whose weights are 0; deltas."""
    q_tile = _load(q, start, count, head, heads, keep, HEAD_DIM, HEAD_DIM, D, UPCAST)
    go = _load(grad_out, start, count, head, heads, keep, VALUE_DIM, VALUE_DIM, DV, UPCAST)
    norm = _load_numbers(lse, start, count, head, heads, keep, float("-inf"))
    norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    return q_tile, go, norm, _load_numbers(delta, start, count, head, heads, keep, 0.0)


@triton.jit
def _weights(a, b, a_out, b_out, norm, delta, scale, softcap, SOFTCAP: tl.constexpr):
    """Weights, and gradients of scores; (a, b) are (q, k) or (k, q), outputs' gradients and values
    likewise, and norm and delta broadcast along the queries' side."""
    s, slope = _scores(a, b, scale, softcap, SOFTCAP)
    p = tl.exp2(s - norm)
    ds = p * (tl.dot(a_out, tl.trans(b_out), input_precision="ieee") - delta)
    if SOFTCAP:
        ds = ds * slope
    return p, ds


@triton.jit(do_not_specialize=_VARYING)
def query_gradient_kernel(
    q, grad_out, lse, delta, kv, grad_q,
    table, first_tile, tiles_at, entries_at, bands_at,
    heads, kv_heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    entries, bands = table + entries_at, table + bands_at
    work = tl.program_id(0)
    head = work % heads
    kv_head = head // (heads // kv_heads)
    tile, start, used, result = _outer_tile(table, tiles_at, first_tile + work // heads, OUTER)
    row = start + tl.arange(0, OUTER)
    q_tile, go, norm, drop = _query_side(
        q, grad_out, lse, delta, start, OUTER, head, heads, used, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
    )
    norm, drop = norm[:, None], drop[:, None]
    acc = tl.zeros([OUTER, D], dtype=tl.float32)

    for entry in range(tl.load(tile + 3), tl.load(tile + 4)):
        at = entries + entry * WIDTH
        first = tl.load(at)
        for visit in range(tl.load(at + 1)):  # noqa: B007
            k, v = _load_pair(
                kv, first, INNER, kv_head, kv_heads, None, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
            )
            _p, ds = _weights(q_tile, k, go, v, norm, drop, scale, softcap, SOFTCAP)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
            first += INNER
    for entry in range(tl.load(tile + 4), tl.load(tile + 5)):
        first, keep, seen, _shifts = _masked_tile(bands, entries + entry * WIDTH, row, INNER)
        k, v = _load_pair(
            kv, first, INNER, kv_head, kv_heads, seen, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
        )
        k, v, fault = _finite_rows(k, v)
        _p, ds = _weights(q_tile, k, go, v, norm, drop, scale, softcap, SOFTCAP)
        ds = tl.where(keep, ds + fault[None, :], 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    _add(grad_q, result, OUTER, head, heads, used, acc * scale, HEAD_DIM, HEAD_DIM, D)


@triton.jit
def _add_atomically(base, row, head, num_heads, keep, x, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    at = base + (row.to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    mask = (d < HEAD_DIM)[None, :] if keep is None else keep[:, None] & (d < HEAD_DIM)[None, :]
    tl.atomic_add(at, x, mask=mask, sem="relaxed")


@triton.jit
def _key_step(
    acc_k, acc_v, k, v, finite_k, key_fault, used, shift, keep, seen,
    q, grad_out, lse, delta, grad_q, first, head, heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    INNER: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """One inner tile of queries, all its pairs where ``keep`` is None."""
    q_tile, go, norm, drop = _query_side(
        q, grad_out, lse, delta, first, INNER, head, heads, seen, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
    )
    if keep is not None:
        q_tile, go, fault = _finite_rows(q_tile, go)
    p, ds = _weights(k, q_tile, v, go, norm[None, :], drop[None, :], scale, softcap, SOFTCAP)
    if ATOMIC:  # the weights of unused rows, whose keys are 0, may be infinite
        ds = tl.where(used[:, None], ds + key_fault[:, None], 0.0)
    if keep is not None:
        p = tl.where(keep, p + fault[None, :], 0.0)
        ds = tl.where(keep, ds + fault[None, :], 0.0)
    acc_v = tl.dot(p.to(go.dtype), go, acc_v, input_precision="ieee")
    ds = ds.to(q_tile.dtype)
    acc_k = tl.dot(ds, q_tile, acc_k, input_precision="ieee")
    if ATOMIC:
        dq = tl.dot(tl.trans(ds), finite_k, input_precision="ieee") * scale
        rows = first + tl.arange(0, INNER) + shift
        _add_atomically(grad_q, rows, head, heads, seen, dq, HEAD_DIM, D)
    return acc_k, acc_v


@triton.jit(do_not_specialize=_VARYING)
def key_gradient_kernel(
    q, grad_out, lse, delta, kv, grad_q, grad_kv,
    table, first_tile, tiles_at, entries_at, bands_at,
    heads, kv_heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Keys and values outside. The query heads of a KV head are summed in one program; ATOMIC adds
    the query gradients too, in no fixed order, and saves a second look at every tile."""
    entries, bands = table + entries_at, table + bands_at
    ratio = heads // kv_heads
    work = tl.program_id(0)
    kv_head = work % kv_heads
    tile, start, used, result = _outer_tile(table, tiles_at, first_tile + work // kv_heads, OUTER)
    row = start + tl.arange(0, OUTER)
    k, v = _load_pair(kv, start, OUTER, kv_head, kv_heads, used, HEAD_DIM, D, VALUE_DIM, DV, UPCAST)
    finite_k, _v, key_fault = _finite_rows(k, v)
    acc_k = tl.zeros([OUTER, D], dtype=tl.float32)
    acc_v = tl.zeros([OUTER, DV], dtype=tl.float32)

    for head in range(kv_head * ratio, (kv_head + 1) * ratio):
        for entry in range(tl.load(tile + 3), tl.load(tile + 4)):
            at = entries + entry * WIDTH
            first = tl.load(at)
            shift = tl.load(at + 4)
            for visit in range(tl.load(at + 1)):  # noqa: B007
                acc_k, acc_v = _key_step(
                    acc_k, acc_v, k, v, finite_k, key_fault, used, shift, None, None,
                    q, grad_out, lse, delta, grad_q, first, head, heads, scale, softcap,
                    HEAD_DIM, D, VALUE_DIM, DV, INNER, SOFTCAP, UPCAST, ATOMIC,
                )  # fmt: skip
                first += INNER
        for entry in range(tl.load(tile + 4), tl.load(tile + 5)):
            first, keep, seen, shifts = _masked_tile(bands, entries + entry * WIDTH, row, INNER)
            acc_k, acc_v = _key_step(
                acc_k, acc_v, k, v, finite_k, key_fault, used, shifts, keep, seen,
                q, grad_out, lse, delta, grad_q, first, head, heads, scale, softcap,
                HEAD_DIM, D, VALUE_DIM, DV, INNER, SOFTCAP, UPCAST, ATOMIC,
            )  # fmt: skip
    acc_k *= scale
    if HEAD_DIM == VALUE_DIM:
        _add(grad_kv, result, OUTER, kv_head, 2 * kv_heads, used, acc_k, HEAD_DIM, HEAD_DIM, D)
        head = kv_heads + kv_head
        _add(grad_kv, result, OUTER, head, 2 * kv_heads, used, acc_v, HEAD_DIM, HEAD_DIM, D)
    else:
        BOTH: tl.constexpr = HEAD_DIM + VALUE_DIM
        _add(grad_kv, result, OUTER, kv_head, kv_heads, used, acc_k, BOTH, HEAD_DIM, D)
        _add(grad_kv + HEAD_DIM, result, OUTER, kv_head, kv_heads, used, acc_v, BOTH, VALUE_DIM, DV)


@triton.jit(do_not_specialize=["count"])
def delta_kernel(
    grad_out, out, delta, count, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):
    """``delta [count]``: the sum of ``grad_out * out`` over each of ``count`` rows of HEAD_DIM."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    at = row[:, None] * HEAD_DIM + d[None, :]
    keep = (row < count)[:, None] & (d < HEAD_DIM)[None, :]
    a = tl.load(grad_out + at, mask=keep, other=0.0).to(tl.float32)
    b = tl.load(out + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(a * b, 1), mask=row < count)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(
    out, lse, more_out, more_lse, count, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):
    """Fold ``more_out [count, HEAD_DIM]`` and ``more_lse [count]`` into ``out`` and ``lse``; what
    saw nothing (-inf in both) stays 0 and -inf."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim, used = tl.arange(0, D), row < count
    at = row[:, None] * HEAD_DIM + dim
    keep = used[:, None] & (dim < HEAD_DIM)
    a = tl.load(lse + row, mask=used, other=float("-inf"))
    b = tl.load(more_lse + row, mask=used, other=float("-inf"))
    most = tl.maximum(a, b)
    most = tl.where(most == float("-inf"), 0.0, most)
    weight_a, weight_b = tl.exp(a - most), tl.exp(b - most)
    both = weight_a + weight_b
    whole = tl.where(both > 0, both, 1.0)
    whole = tl.where(both == both, whole, both)  # NaN stays
    first = tl.load(out + at, mask=keep, other=0.0) * (weight_a / whole)[:, None]
    second = tl.load(more_out + at, mask=keep, other=0.0) * (weight_b / whole)[:, None]
    tl.store(out + at, first + second, mask=keep)
    tl.store(lse + row, most + tl.log(both), mask=used)
