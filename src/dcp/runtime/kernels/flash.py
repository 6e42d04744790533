"""Attention by torch's own FlashAttention: a division's slices as sequences of variable length.

What :func:`torch.nn.attention.varlen.varlen_attn` calls, by the operators that take and return the
log-sum-exp: FlashAttention-2, or 3 or 4 after ``torch.nn.attention.activate_flash_attention_impl``.
Items of many small slices go to the Triton kernel, in the same division.

As everywhere in FlashAttention, a row that is not finite may spoil rows of its tile that do not see
it. Not measured on a device yet, and so taken by name only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.program import MaskProgram
from dcp.runtime.division import DKV_SHIFT, OUT_SHIFT
from dcp.runtime.kernels import Kernel, Options, QSide, finite, merge, split_kv
from dcp.runtime.kernels import triton as tiles
from dcp.runtime.kernels.cellwise import one_width, output_of
from dcp.runtime.rows import Rows, copy_to_device, place_rows
from dcp.runtime.waves import Wave, Window, program_waves
from dcp.slices import K0, K1, Q0, Q1

MAX_HEAD_DIM = 256
_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True)
class Call:
    """A :class:`dcp.runtime.waves.Wave` on a device.

    Attributes:
        q, k, out, dkv: rows of queries and keys in their order, and of their results.
        ends_q, ends_k: of its sequences in those, from 0 on: int32 ``[n + 1]``.
        longest: queries and keys of its longest sequences.
    """

    q: Rows
    k: Rows
    out: Rows
    dkv: Rows
    ends_q: Tensor
    ends_k: Tensor
    longest: tuple[int, int]
    window: Window
    first: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of both operators: where sequences end, the longest, no dropout, whether causal."""
        return self.ends_q, self.ends_k, *self.longest, 0.0, self.window == (-1, 0)

    def options(self, options: Options) -> dict[str, Any]:
        left, right = self.window
        return {
            "scale": options.scale,
            "window_size_left": left,
            "window_size_right": right,
        }


@dataclass(frozen=True)
class Work:
    """One division: calls of flash attention, then what is left to tiles."""

    calls: list[Call]
    rest: tiles.Work | None


class FlashKernel(Kernel):
    name = "flash"
    by_name_on = ("cuda",)

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        if device.type != "cuda":
            return "it runs on CUDA devices only"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than FlashAttention-2 needs"
        return _unserved(dtype, options)

    def prepare(
        self, program: MaskProgram, device: torch.device, *, widest: int, dtype: torch.dtype
    ) -> dict[int, Work]:
        options = Options(head_dim=widest, scale=1.0)
        has_tiles = tiles.KERNEL.refusal(device, dtype, options) is None
        waves = program_waves(program) if has_tiles else program_waves(program, many=None)
        placed = _place([wave for some, _ in waves.values() for wave in some], device)
        calls = {step: [next(placed) for _ in some] for step, (some, _) in waves.items()}
        rest: dict[int, tiles.Work] = {}
        if any(len(items) for _, items in waves.values()):
            left = {step: items for step, (_, items) in waves.items()}
            shapes = tiles.choose_shapes(device, widest, dtype)
            rest = tiles.place_tables(program, device, shapes, items=left)
        return {
            step: Work(calls[step], rest.get(step) if len(items) else None)
            for step, (_, items) in waves.items()
        }

    def forward(
        self, work: Work, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:
        for call in work.calls:
            k, v = split_kv(call.k.take(kv), options.head_dim)
            found = _forward(
                *one_width(call.q.take(q), k, v), *call.arguments, False, **call.options(options)
            )
            part, part_lse = found[0][..., : out.shape[-1]], found[1].T
            if call.first:
                call.out.put(out, part)
                call.out.put(lse, part_lse)
            else:
                so_far = call.out.take(out), call.out.take(lse)
                merge(*so_far, part.to(out.dtype), part_lse)
                call.out.put(out, so_far[0])
                call.out.put(lse, so_far[1])
        if work.rest is not None:
            tiles.KERNEL.forward(work.rest, q, kv, out, lse, options)

    def backward(
        self,
        work: Work,
        q_side: QSide,
        kv: Tensor,
        grad_q: Tensor,
        grad_kv: Tensor,
        options: Options,
    ) -> None:
        grad_k, grad_v = split_kv(grad_kv, options.head_dim)
        for call in work.calls:
            q, grad_out, lse, delta = (call.q.take(side) for side in q_side)
            k, v = split_kv(call.k.take(kv), options.head_dim)
            out = output_of(delta, grad_out)
            with _deterministic(options.deterministic):
                grads = _backward(
                    *one_width(grad_out, q, k, v, out),
                    finite(lse).T.contiguous(),
                    *call.arguments,
                    torch.zeros(2, dtype=torch.uint64, device=q.device),  # of dropout
                    torch.empty(0, device=q.device),
                    **call.options(options),
                )
            sides = ((call.out, grad_q), (call.dkv, grad_k), (call.dkv, grad_v))
            for grad, (rows, target) in zip(grads, sides, strict=True):
                rows.add(target, grad[..., : target.shape[-1]])
        if work.rest is not None:
            tiles.KERNEL.backward(work.rest, q_side, kv, grad_q, grad_kv, options)


def _unserved(dtype: torch.dtype, options: Options) -> str | None:
    """Why the operators cannot serve, on any device; None where they can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {dtype}"
    if options.softcap is not None:
        return "torch's operators have no soft-cap"
    if options.widest > MAX_HEAD_DIM or options.widest % 8:
        return f"it serves head_dim in multiples of 8 up to {MAX_HEAD_DIM}, not {options.widest}"
    return None


def _place(waves: list[Wave], device: torch.device) -> Iterator[Call]:
    """All waves of a program on a device, in two copies to it."""
    runs, ends = [], []
    for wave in waves:
        s = wave.slices
        queries, keys = s[:, Q1] - s[:, Q0], s[:, K1] - s[:, K0]
        runs += [(s[:, Q0], queries), (s[:, K0], keys)]
        runs += [(s[:, Q0] + s[:, OUT_SHIFT], queries), (s[:, K0] + s[:, DKV_SHIFT], keys)]
        ends += [np.append(0, np.cumsum(lengths)) for lengths in (queries, keys)]
    rows = iter(place_rows(runs, device))
    flat = np.concatenate([np.zeros(0), *ends]).astype(np.int32)
    on_device = iter(copy_to_device(flat, device).split([len(each) for each in ends]))
    for wave, queries, keys in zip(waves, ends[::2], ends[1::2], strict=True):
        q, k, out, dkv = (next(rows) for _ in range(4))
        longest = int(np.diff(queries).max()), int(np.diff(keys).max())
        yield Call(
            q, k, out, dkv, next(on_device), next(on_device), longest, wave.window, wave.first
        )


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """FlashAttention-2's backward pass adds in a fixed order where torch is told to everywhere."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or before:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


KERNEL = FlashKernel()
