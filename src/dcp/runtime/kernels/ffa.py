"""Attention by MagiAttention's ``flex_flash_attn_func``, where it is installed: slices of the four
kinds are its own form, and a division is one call. Forward only.

Its documented interface (``magi_attention.api``): ranges of queries and keys in pairs, a kind for
each; pairs may share queries, and what they find is summed inside. It gives the output and the
log-sum-exp, but differentiates by its own log-sum-exp and ignores a gradient of it, and names no
function for the backward pass: gradients of a part of the keys cannot be had from it.

Not run on a device yet, and so taken by name only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.program import MaskProgram
from dcp.runtime.division import OUT_SHIFT, attention_steps, merged_slices
from dcp.runtime.kernels import Kernel, Options, QSide, split_kv
from dcp.runtime.kernels.cellwise import merge
from dcp.runtime.rows import Rows, copy_to_device, place_rows
from dcp.slices import HI, K0, K1, LO, Q0, Q1, tighten

FULL, CAUSAL, INV_CAUSAL = 0, 1, 2  # both of the latter: 3
MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class Work:
    """One division on a device.

    Attributes:
        q, out, k: rows of the queries, in the call's order, of their results, and of the keys.
        q_ranges, k_ranges: of the slices, in the call's queries and keys: int32 ``[n, 2]``.
        kinds: of the slices, int32 ``[n]``.
    """

    q: Rows
    out: Rows
    k: Rows
    q_ranges: Tensor
    k_ranges: Tensor
    kinds: Tensor


class FfaKernel(Kernel):
    name = "ffa"
    by_name_on = ("cuda",)

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        if find_spec("magi_attention") is None:
            return "MagiAttention is not installed"
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
            return "it runs on CUDA devices from Hopper on only"
        if "return_max_logits" not in signature(_function()).parameters:
            return "this MagiAttention is older than 1.1, whose interface is called"
        return _unserved(dtype, options)

    def prepare(
        self, program: MaskProgram, device: torch.device, *, widest: int, dtype: torch.dtype
    ) -> dict[int, Work | None]:
        return {
            step.step: _place(merged_slices(step.items, program.slices), device)
            for step in attention_steps(program)
        }

    def forward(
        self, work: Work | None, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:
        if work is None:
            return
        k, v = split_kv(work.k.take(kv), options.head_dim)
        part, meta = _function()(
            work.q.take(q),
            k.contiguous(),
            v.contiguous(),
            q_ranges=work.q_ranges,
            k_ranges=work.k_ranges,
            attn_type_map=work.kinds,
            softmax_scale=options.scale,
            softcap=options.softcap or 0.0,
            deterministic=options.deterministic,
        )
        so_far = work.out.take(out), work.out.take(lse)
        merge(*so_far, part.to(out.dtype), meta.lse.to(lse.dtype))
        work.out.put(out, so_far[0])
        work.out.put(lse, so_far[1])

    def backward(
        self,
        work: Any,
        q_side: QSide,
        kv: Tensor,
        grad_q: Tensor,
        grad_kv: Tensor,
        options: Options,
    ) -> None:
        raise AssertionError("ffa was chosen for a call that needs gradients")


@cache
def _function() -> Callable[..., Any]:
    found: Callable[..., Any] = import_module("magi_attention.api").flex_flash_attn_func
    return found


def _unserved(dtype: torch.dtype, options: Options) -> str | None:
    """Why the function cannot serve, on any device; None where it can."""
    if options.needs_grad:
        return "its public function has no backward pass of a part of the keys"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {dtype}"
    if options.value_dim not in (0, options.head_dim):
        return f"it has no values of another width ({options.value_dim}) than keys"
    if options.head_dim > MAX_HEAD_DIM or options.head_dim % 8:
        return f"it serves head_dim in multiples of 8 up to {MAX_HEAD_DIM}, not {options.head_dim}"
    return None


def of_four_kinds(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same pairs in slices whose bands touch their corners, and the kind of each.

    Rows from which on a band's upper side leaves the rectangle, and before which its lower side
    has not entered it, are slices of their own.

    Args:
        slices: int64 ``[n, 6 + …]``; columns behind the six stay.
    """
    tight = tighten(slices)
    leaves, enters = tight[:, K1] - tight[:, HI], tight[:, K0] - tight[:, LO]
    cuts = np.sort(np.clip([leaves, enters], tight[:, Q0], tight[:, Q1]), axis=0)
    rows = [tight[:, Q0], *cuts, tight[:, Q1]]
    parts = []
    for start, stop in pairwise(rows):
        part = tight.copy()
        part[:, Q0], part[:, Q1] = start, stop
        parts.append(part[start < stop])
    found = tighten(np.concatenate(parts))
    kinds = CAUSAL * (found[:, HI] < found[:, K1] - 1 - found[:, Q0])
    kinds += INV_CAUSAL * (found[:, LO] > found[:, K0] - found[:, Q1] + 1)
    return found, kinds


def _place(slices: np.ndarray, device: torch.device) -> Work | None:
    """A division's slices as one call; None where it has no pair."""
    parts, kinds = of_four_kinds(slices)
    if not len(parts):
        return None
    shifts, which = np.unique(parts[:, OUT_SHIFT], return_inverse=True)
    which = which.reshape(-1)
    start, stop = (parts[:, side] + parts[:, OUT_SHIFT] for side in (Q0, Q1))
    far = int(stop.max()) + 1  # keeps results of different shifts in stretches of their own
    row, rows, q_ranges = _stretches(start + which * far, stop + which * far)
    of, row = np.divmod(row, far)
    key, keys, k_ranges = _stretches(parts[:, K0], parts[:, K1])
    q, out, k = place_rows([(row - shifts[of], rows), (row, rows), (key, keys)], device)
    tables = (each.astype(np.int32) for each in (q_ranges, k_ranges, kinds))
    return Work(q, out, k, *(copy_to_device(each, device) for each in tables))


def _stretches(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row and rows of each stretch that some runs cover; the runs ``[n, 2]`` in the rows of
    the stretches, one after another."""
    order = np.argsort(start, kind="stable")
    begin, end = start[order], np.maximum.accumulate(stop[order])
    first = np.flatnonzero(np.append(True, begin[1:] > end[:-1]))
    row, rows = begin[first], end[np.append(first[1:], len(order)) - 1] - begin[first]
    stretch = np.searchsorted(row, start, side="right") - 1
    offset = (np.cumsum(rows) - rows - row)[stretch]
    return row, rows, np.stack([start + offset, stop + offset], axis=1)


KERNEL = FfaKernel()
