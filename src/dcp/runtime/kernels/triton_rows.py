"""Triton code that goes through rows once: sums of products of rows, two partial results in one."""

# Types would say nothing here: the compiler gives arguments theirs.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


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
