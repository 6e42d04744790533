"""The forward kernel: FlashAttention-2's loop (arXiv 2307.08691) over tile tables, with a start
from an earlier partial result. See :mod:`dcp.runtime.kernels.triton_tiles` for the words."""

# Types would say nothing here: the compiler gives arguments theirs.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from dcp.runtime.kernels.triton_tiles import (
    LN2,
    LOG2E,
    WIDTH,
    _descriptor,
    _finite,
    _in_band,
    _lines,
    _load,
    _load_full_pair,
    _load_numbers,
    _load_pair,
    _outer_tile,
    _pointers,
    _row_numbers,
    _scores,
    _unit,
)


@triton.jit
def _fold(acc, top, total, s, unit, v):
    """One inner tile into the running (accumulator, maximum, sum): online softmax."""
    new_top = tl.maximum(top, tl.max(s, 1) * unit)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * unit - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _fold_masked(
    acc, top, total, q_tile, kv, first, keep, seen, kv_head, kv_heads, scale, softcap, unit,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, VALUE_DIM: tl.constexpr, DV: tl.constexpr,
    INNER: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same of the pairs in ``keep``, whose keys are in ``seen``."""
    k, v = _load_pair(kv, first, INNER, kv_head, kv_heads, seen, HEAD_DIM, D, VALUE_DIM, DV, UPCAST)
    v, fault = _finite(v)
    s, _slope = _scores(q_tile, k, scale, softcap, SOFTCAP)
    s = tl.where(keep, s + fault[None, :], float("-inf"))
    return _fold(acc, top, total, s, unit, v)


# Counts and rows change with every plan: never a reason to compile again.
@triton.jit(do_not_specialize=["first_tile", "tiles_at", "entries_at"])
def forward_kernel(
    q, kv, out, lse, table, first_tile, tiles_at, entries_at,
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
    q_tile = _load(q, start, OUTER, head, heads, used, HEAD_DIM, HEAD_DIM, D, UPCAST, PACK)
    unit = _unit(scale, softcap, SOFTCAP)

    # go on from what earlier divisions left, where they left anything: an output is a sum with
    # weight 1 at its lse
    top = _load_numbers(lse, result, OUTER, head, heads, used, float("-inf"), PACK) * LOG2E
    some = top != float("-inf")
    total = tl.where(some, 1.0, 0.0)
    acc = _load(out, result, OUTER, head, heads, some, VALUE_DIM, VALUE_DIM, DV, True, PACK)

    source = _descriptor(kv, 2 * kv_heads * D, INNER, D) if DESCRIBED else kv
    for entry in range(tl.load(tile + 3), tl.load(tile + 4)):
        at = entries + entry * WIDTH
        first = tl.load(at)
        for visit in range(tl.load(at + 1) * REPEAT):  # noqa: B007
            k, v = _load_full_pair(
                source, first, INNER, kv_head, kv_heads,
                HEAD_DIM, D, VALUE_DIM, DV, UPCAST, DESCRIBED,
            )  # fmt: skip
            s, _slope = _scores(q_tile, k, scale, softcap, SOFTCAP)
            acc, top, total = _fold(acc, top, total, s, unit, v)
            first += INNER
    for visit in range(tl.load(tile + 4) * REPEAT, tl.load(tile + 5) * REPEAT):
        at = entries + visit // REPEAT * WIDTH
        first = tl.load(at) + visit % REPEAT * INNER
        keep, seen, _shift = _in_band(at, row, first + tl.arange(0, INNER))
        acc, top, total = _fold_masked(
            acc, top, total, q_tile, kv, first, keep, seen, kv_head, kv_heads, scale, softcap, unit,
            HEAD_DIM, D, VALUE_DIM, DV, INNER, SOFTCAP, UPCAST,
        )  # fmt: skip

    some = total != 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    at_out = _pointers(out, result, OUTER, head, heads, VALUE_DIM, DV, PACK)
    tl.store(at_out, acc, mask=used[:, None] & (tl.arange(0, DV) < VALUE_DIM)[None, :])
    new_lse = top * LN2 + tl.log(tl.where(some, total, 1.0))
    at_lse = lse + result.to(tl.int64) * heads + head + _lines(OUTER, heads, PACK)
    tl.store(at_lse, tl.where(some, new_lse, float("-inf")), mask=used)
