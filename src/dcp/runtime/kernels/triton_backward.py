"""The backward kernels over tile tables: query gradients, key and value gradients. See
:mod:`dcp.runtime.kernels.triton_tiles` for the words."""

# Types would say nothing here: the compiler gives arguments theirs.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from dcp.runtime.kernels.triton_tiles import (
    LOG2E,
    WIDTH,
    _add,
    _descriptor,
    _finite,
    _in_band,
    _load,
    _load_described,
    _load_full_pair,
    _load_numbers,
    _load_pair,
    _outer_tile,
    _row_numbers,
    _scores,
    _unit,
)

# Counts and rows change with every plan: never a reason to compile again.
_VARYING = ["first_tile", "tiles_at", "entries_at"]


@triton.jit
def _query_side(
    q, grad_out, lse, delta, start, count: tl.constexpr, head, heads, keep,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    UPCAST: tl.constexpr, PACK: tl.constexpr, DESCRIBED: tl.constexpr = False,
):  # fmt: skip
    """Queries and output gradients, DESCRIBED: by descriptors; log-sum-exps in powers of two,
    infinite for rows that see nothing, whose weights are 0; deltas."""
    if DESCRIBED:
        q_tile = _load_described(q, start, head, D, UPCAST)
        go = _load_described(grad_out, start, head, D, UPCAST)
    else:
        q_tile = _load(q, start, count, head, heads, keep, HEAD_DIM, HEAD_DIM, D, UPCAST, PACK)
        go = _load(
            grad_out, start, count, head, heads, keep, VALUE_DIM, VALUE_DIM, DV, UPCAST, PACK
        )
    norm = _load_numbers(lse, start, count, head, heads, keep, float("-inf"), PACK)
    norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    return q_tile, go, norm, _load_numbers(delta, start, count, head, heads, keep, 0.0, PACK)


@triton.jit
def _weights(a, b, a_out, b_out, norm, delta, scale, softcap, SOFTCAP: tl.constexpr):
    """Weights, and gradients of scores; (a, b) are (q, k) or (k, q), outputs' gradients and values
    likewise, and norm and delta broadcast along the queries' side."""
    s, slope = _scores(a, b, scale, softcap, SOFTCAP)
    p = tl.exp2(s * _unit(scale, softcap, SOFTCAP) - norm)
    ds = p * (tl.dot(a_out, tl.trans(b_out), input_precision="ieee") - delta)
    if SOFTCAP:
        ds = ds * slope
    return p, ds


@triton.jit
def _query_step(
    acc, q_tile, go, norm, drop, kv, first, keep, seen, kv_head, kv_heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    INNER: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One inner tile of keys, all its pairs where ``keep`` is None; ``kv`` may be a descriptor."""
    if keep is None:
        k, v = _load_full_pair(
            kv, first, INNER, kv_head, kv_heads, HEAD_DIM, D, VALUE_DIM, DV, UPCAST, DESCRIBED
        )
    else:
        k, v = _load_pair(
            kv, first, INNER, kv_head, kv_heads, seen, HEAD_DIM, D, VALUE_DIM, DV, UPCAST
        )
        k, fault = _finite(k)
    _p, ds = _weights(q_tile, k, go, v, norm[:, None], drop[:, None], scale, softcap, SOFTCAP)
    if keep is not None:
        ds = tl.where(keep, ds + fault[None, :], 0.0)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=_VARYING)
def query_gradient_kernel(
    q, grad_out, lse, delta, kv, grad_q,
    table, first_tile, tiles_at, entries_at,
    heads, kv_heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, REPEAT: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PACK: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    entries = table + entries_at
    work = tl.program_id(0)
    head = work % (heads // PACK) * PACK
    kv_head = head // (heads // kv_heads)
    number = first_tile + work // (heads // PACK)
    tile, start, used, result = _outer_tile(table, tiles_at, number, OUTER, PACK)
    row = _row_numbers(start, OUTER, PACK)
    q_tile, go, norm, drop = _query_side(
        q, grad_out, lse, delta, start, OUTER, head, heads, used,
        HEAD_DIM, D, VALUE_DIM, DV, UPCAST, PACK,
    )  # fmt: skip
    acc = tl.zeros([OUTER, D], dtype=tl.float32)

    source = _descriptor(kv, 2 * kv_heads * D, INNER, D) if DESCRIBED else kv
    for entry in range(tl.load(tile + 3), tl.load(tile + 4)):
        at = entries + entry * WIDTH
        first = tl.load(at)
        for visit in range(tl.load(at + 1) * REPEAT):  # noqa: B007
            acc = _query_step(
                acc, q_tile, go, norm, drop, source, first, None, None, kv_head, kv_heads, scale,
                softcap, HEAD_DIM, D, VALUE_DIM, DV, INNER, SOFTCAP, UPCAST, DESCRIBED,
            )  # fmt: skip
            first += INNER
    for visit in range(tl.load(tile + 4) * REPEAT, tl.load(tile + 5) * REPEAT):
        at = entries + visit // REPEAT * WIDTH
        first = tl.load(at) + visit % REPEAT * INNER
        keep, seen, _shift = _in_band(at, row, first + tl.arange(0, INNER))
        acc = _query_step(
            acc, q_tile, go, norm, drop, kv, first, keep, seen, kv_head, kv_heads, scale, softcap,
            HEAD_DIM, D, VALUE_DIM, DV, INNER, SOFTCAP, UPCAST, False,
        )  # fmt: skip
    _add(grad_q, result, OUTER, head, heads, used, acc * scale, HEAD_DIM, HEAD_DIM, D, PACK)


@triton.jit
def _add_atomically(
    base, row, head, num_heads, keep, x,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Add lines of a tile to the rows ``row`` of their heads."""
    line = row.to(tl.int64) * num_heads + head + tl.arange(0, row.shape[0]) % PACK
    d = tl.arange(0, D)
    at = base + line[:, None] * HEAD_DIM + d[None, :]
    mask = (d < HEAD_DIM)[None, :] if keep is None else keep[:, None] & (d < HEAD_DIM)[None, :]
    tl.atomic_add(at, x, mask=mask, sem="relaxed")


@triton.jit
def _key_step(
    acc_k, acc_v, k, v, finite_k, key_fault, used, shift, keep, seen,
    q, grad_out, lse, delta, grad_q, first, head, heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    INNER: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ATOMIC: tl.constexpr,
    PACK: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One inner tile of queries, all its pairs where ``keep`` is None; then ``q`` and ``grad_out``
    may be descriptors."""
    q_tile, go, norm, drop = _query_side(
        q, grad_out, lse, delta, first, INNER, head, heads, seen,
        HEAD_DIM, D, VALUE_DIM, DV, UPCAST, PACK, DESCRIBED,
    )  # fmt: skip
    if keep is not None:
        q_tile, q_fault = _finite(q_tile)
        go, fault = _finite(go)
        fault += q_fault
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
        rows = _row_numbers(first, INNER, PACK) + shift
        _add_atomically(grad_q, rows, head, heads, seen, dq, HEAD_DIM, D, PACK)
    return acc_k, acc_v


@triton.jit(do_not_specialize=_VARYING)
def key_gradient_kernel(
    q, grad_out, lse, delta, kv, grad_q, grad_kv, sums,
    table, first_tile, tiles_at, entries_at,
    heads, kv_heads, scale, softcap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, REPEAT: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ATOMIC: tl.constexpr, PACK: tl.constexpr,
    DESCRIBED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Keys and values outside. The query heads of a KV head are summed in one program; ATOMIC adds
    the query gradients too, in no fixed order, and saves a second look at every tile.

    With PARTS programs a tile, each takes every so manieth visit, from another one on with every
    head and entry, and leaves its sums in ``sums``: [programs, OUTER, D + DV]."""
    entries = table + entries_at
    ratio = heads // kv_heads
    work = tl.program_id(0)
    part = work % PARTS
    kv_head = work // PARTS % kv_heads
    number = first_tile + work // PARTS // kv_heads
    tile, start, used, result = _outer_tile(table, tiles_at, number, OUTER)
    row = start + tl.arange(0, OUTER)
    k, v = _load_pair(kv, start, OUTER, kv_head, kv_heads, used, HEAD_DIM, D, VALUE_DIM, DV, UPCAST)
    finite_k, k_fault = _finite(k)
    _v, v_fault = _finite(v)
    key_fault = k_fault + v_fault
    acc_k = tl.zeros([OUTER, D], dtype=tl.float32)
    acc_v = tl.zeros([OUTER, DV], dtype=tl.float32)
    STEP: tl.constexpr = INNER // PACK

    q_source = _descriptor(q, heads * D, INNER, D) if DESCRIBED else q
    go_source = _descriptor(grad_out, heads * D, INNER, D) if DESCRIBED else grad_out
    for head in range(kv_head * ratio, (kv_head + 1) * ratio, PACK):
        turn = part + head // PACK
        for entry in range(tl.load(tile + 3), tl.load(tile + 4)):
            at = entries + entry * WIDTH
            shift = tl.load(at + 7)
            skipped = (turn + entry) % PARTS
            first = tl.load(at) + skipped * STEP
            for visit in range(skipped, tl.load(at + 1) * REPEAT, PARTS):  # noqa: B007
                acc_k, acc_v = _key_step(
                    acc_k, acc_v, k, v, finite_k, key_fault, used, shift, None, None,
                    q_source, go_source, lse, delta, grad_q, first, head, heads, scale, softcap,
                    HEAD_DIM, D, VALUE_DIM, DV, INNER, SOFTCAP, UPCAST, ATOMIC, PACK, DESCRIBED,
                )  # fmt: skip
                first += PARTS * STEP
        first_masked, end = tl.load(tile + 4) * REPEAT, tl.load(tile + 5) * REPEAT
        for visit in range(first_masked + turn % PARTS, end, PARTS):
            at = entries + visit // REPEAT * WIDTH
            first = tl.load(at) + visit % REPEAT * STEP
            keep, seen, shift = _in_band(at, row, _row_numbers(first, INNER, PACK))
            acc_k, acc_v = _key_step(
                acc_k, acc_v, k, v, finite_k, key_fault, used, shift, keep, seen,
                q, grad_out, lse, delta, grad_q, first, head, heads, scale, softcap,
                HEAD_DIM, D, VALUE_DIM, DV, INNER, SOFTCAP, UPCAST, ATOMIC, PACK, False,
            )  # fmt: skip
    if PARTS == 1:
        _add_keys(
            grad_kv, result, OUTER, kv_head, kv_heads, used, acc_k * scale, acc_v,
            HEAD_DIM, D, VALUE_DIM, DV,
        )  # fmt: skip
    else:
        at = _sums_at(sums, work, OUTER, D, D + DV)
        tl.store(at, acc_k * scale)
        tl.store(_sums_at(sums + D, work, OUTER, DV, D + DV), acc_v)


@triton.jit
def _add_keys(
    grad_kv, result, OUTER: tl.constexpr, kv_head, kv_heads, used, sum_k, sum_v,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Add a tile's gradients of keys and values."""
    if HEAD_DIM == VALUE_DIM:
        _add(grad_kv, result, OUTER, kv_head, 2 * kv_heads, used, sum_k, HEAD_DIM, HEAD_DIM, D)
        head = kv_heads + kv_head
        _add(grad_kv, result, OUTER, head, 2 * kv_heads, used, sum_v, HEAD_DIM, HEAD_DIM, D)
    else:
        BOTH: tl.constexpr = HEAD_DIM + VALUE_DIM
        _add(grad_kv, result, OUTER, kv_head, kv_heads, used, sum_k, BOTH, HEAD_DIM, D)
        grad_v = grad_kv + HEAD_DIM
        _add(grad_v, result, OUTER, kv_head, kv_heads, used, sum_v, BOTH, VALUE_DIM, DV)


@triton.jit
def _sums_at(sums, number, OUTER: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers to the sums of a program of key_gradient_kernel, ``[OUTER, D]``."""
    first = sums + number.to(tl.int64) * OUTER * STRIDE
    return first + (tl.arange(0, OUTER)[:, None] * STRIDE + tl.arange(0, D)[None, :])


@triton.jit(do_not_specialize=["first_tile", "tiles_at"])
def add_parts_kernel(
    sums, grad_kv, table, first_tile, tiles_at, kv_heads,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    OUTER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add what the programs of each tile left in ``sums``, in their order."""
    work = tl.program_id(0)
    kv_head = work % kv_heads
    number = first_tile + work // kv_heads
    _tile, _start, used, result = _outer_tile(table, tiles_at, number, OUTER)
    sum_k = tl.zeros([OUTER, D], dtype=tl.float32)
    sum_v = tl.zeros([OUTER, DV], dtype=tl.float32)
    for part in range(PARTS):
        sum_k += tl.load(_sums_at(sums, work * PARTS + part, OUTER, D, D + DV))
        sum_v += tl.load(_sums_at(sums + D, work * PARTS + part, OUTER, DV, D + DV))
    _add_keys(
        grad_kv, result, OUTER, kv_head, kv_heads, used, sum_k, sum_v, HEAD_DIM, D, VALUE_DIM, DV
    )
