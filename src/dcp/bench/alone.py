"""One rank's program without its peers, and the same blocks in one launch: what a plan costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.program import MaskProgram, RankPlan
from dcp.ragged import starts
from dcp.runtime.communicator import Messages
from dcp.runtime.kernels import Kernel
from dcp.runtime.passes import AttentionPass, BackwardPass, ForwardPass
from dcp.runtime.prepared import PreparedPlan
from dcp.runtime.session import Call
from dcp.tables import Item


class Nobody:
    """A communicator whose messages arrive at once, with what their memory held."""

    def open(self, *_: Any) -> None:
        """Nobody to connect to."""

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]:
        return iter(())


class Noise:
    """Random numbers in place of uninitialised memory: made once, and handed out again in the same
    order by every pass, so that filling it takes no part of a pass's time."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.next = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What ``torch.empty`` would be asked for."""
        if self.next == len(self.held):
            self.held.append(_random(shape, dtype, device))
        found = self.held[self.next]
        self.next += 1
        assert (found.shape, found.dtype) == (torch.Size(shape), dtype)
        return found


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed; bytes are those of bfloat16, finite in any floating dtype."""
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    count = prod(shape)
    return torch.randn(-(-count // 2), device=device).bfloat16().view(dtype)[:count].view(shape)


def in_one_launch(plan: RankPlan) -> RankPlan:
    """The same compute blocks in a single division, without transfers, every piece in rows of its
    own (in the plan, rows are used again once free)."""
    masks = {name: _one_division(program) for name, program in plan.masks.items()}
    return replace(plan, masks=masks)


def _one_division(program: MaskProgram) -> MaskProgram:
    items = program.items.copy()
    rows = []
    for row, result_row, length in (
        (Item.Q_ROW, Item.OUT_ROW, Item.Q_ROWS),
        (Item.KV_ROW, Item.DKV_ROW, Item.KV_ROWS),
    ):
        _, first, piece = np.unique(
            program.items[:, [Item.STEP, row]], axis=0, return_index=True, return_inverse=True
        )
        lengths = program.items[first, length]
        items[:, row] = items[:, result_row] = starts(lengths)[piece.reshape(-1)]
        rows.append(int(lengths.sum()))
    items[:, Item.STEP] = 0
    nothing = {name: getattr(program, name)[:0] for name in ("sends", "receives", "reduces")}
    return replace(
        program,
        num_steps=1,
        items=items,
        resets=program.resets[:0],
        buffer_rows=np.maximum(np.array(rows * 2), program.buffer_rows),
        **nothing,
    )


class Alone:
    """Forward and backward of one rank's plan on random tensors.

    Args:
        communicator: :class:`Nobody`, or one whose messages arrive in another way.
        timed: note times, as where rates are learnt.
        filled: rows that a peer would have sent, and those that no one sends, hold random numbers.
        trains: the backward pass will be run.
    """

    def __init__(
        self,
        plan: RankPlan,
        kernel: Kernel,
        device: torch.device,
        dtype: torch.dtype,
        *,
        communicator: Nobody | None = None,
        timed: bool = False,
        filled: bool = True,
        trains: bool = True,
    ) -> None:
        spec, tokens = plan.spec, plan.num_local_tokens
        self.prepared, self.kernel = PreparedPlan(plan), kernel
        self.communicator, self.timed = communicator or Nobody(), timed
        self.options = Call().options(spec, needs_grad=trains)
        self.noise = {way: Noise() for way in (False, True)} if filled else {}
        q_shape = (tokens, spec.num_heads, spec.head_dim)
        out_shape = (tokens, spec.num_heads, spec.value_dim)
        self.q, self.kv, self.grad_out = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in (q_shape, (tokens, *spec.kv_shape()), out_shape)
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """out and lse."""
        common = (self.prepared, None, self.kernel, self.q, self.options)
        a_pass = ForwardPass(*common, q=self.q, kv=self.kv)
        self._run(a_pass)
        return a_pass.result_out, a_pass.result_lse

    def backward(self, out: Tensor, lse: Tensor) -> None:
        common = (self.prepared, None, self.kernel, self.q, self.options)
        tensors = {"grad_out": self.grad_out, "q": self.q, "kv": self.kv, "out": out, "lse": lse}
        self._run(BackwardPass(*common, **tensors))

    def _run(self, a_pass: AttentionPass) -> None:
        if self.timed:  # as where rates are learnt
            a_pass.times = a_pass.new_times()
        if self.noise:
            noise = self.noise[a_pass.backward]
            noise.next = 0
            a_pass.empty = partial(noise.empty, device=a_pass.device)  # type: ignore[method-assign]
        for _ in a_pass.run(self.communicator):
            pass
