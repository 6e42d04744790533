"""Attention in three parts, so that two half-batches can take turns.

What one half sends then travels while the other's linear layers and attention are computed, which
planned attention in one piece cannot hide where a document has most of a batch:

    first, second = (executor.bind(plan) for plan in plans)     # dcp.plan_halves
    for layer in layers:
        a = Turn(first, *layer.before(x))        # its queries, keys and values leave
        b = Turn(second, *layer.before(y))
        a.compute()                              # its partial results leave
        b.compute()
        x = layer.after(a.result(), x)
        y = layer.after(b.result(), y)

Autograd runs the backward pass in the reverse order, and so in turns as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from dcp.runtime.executor import BoundPlan, save_results, saved_results
from dcp.runtime.kernels import KV, pack_kv
from dcp.runtime.passes import AttentionPass, BackwardPass, ForwardPass
from dcp.runtime.session import Call, CallOptions


class Turn:
    """One call of attention under a bound plan, begun: its first messages are on their way.

    Call :meth:`compute` and then :meth:`result`, each once. Every rank of the group does the same
    in the same order. A turn cannot be repeated by activation checkpointing, nor compiled.

    Args:
        bound: from :meth:`dcp.AttentionExecutor.bind`.
        q, kv, sink, options: as for :meth:`dcp.DCPAttention.apply`.

    Raises ``ValueError`` as that does.
    """

    def __init__(
        self,
        bound: BoundPlan,
        q: Tensor,
        kv: KV,
        *,
        sink: Tensor | None = None,
        **options: Unpack[CallOptions],
    ) -> None:
        if not isinstance(bound, BoundPlan):
            raise ValueError(
                f"a turn needs a plan of its own, got a {type(bound).__name__}: give "
                "executor.bind(plan)"
            )
        self._bound, self._sink = bound, sink
        # what a part takes says nothing of a pass: rates are not learnt from turns
        self._session = replace(bound.session(Call(**options)), times=None)
        self._forward: _Staged | None = None
        self._backward: _Staged | None = None
        self._tensors: tuple[Tensor, Tensor] = _Begin.apply(self, q, pack_kv(kv))

    def compute(self) -> None:
        """Compute what the rank has to; its results for other ranks are then on their way."""
        self._expect(_BEGUN, "compute()")
        self._tensors = _Compute.apply(self, *self._tensors)

    def result(self) -> Tensor:
        """``[local, heads, value_dim]``."""
        self._expect(_COMPUTED, "result()")
        out: Tensor = _Result.apply(self, *self._tensors, self._sink)[0]
        del self._tensors  # their graph leads back to the turn: both would stay for ever
        return out

    def _expect(self, stage: int, what: str) -> None:
        done = self._forward.stage if self._forward else 0
        if done != stage:
            raise ValueError(
                f"{what} is out of turn: a Turn is made, computed and asked for its result, once "
                f"each; {_STAGES[done]}"
            )

    def _begin(
        self, kind: type[AttentionPass], like: Tensor, *, needs_grad: bool, **tensors: Any
    ) -> _Staged:
        """A pass up to where its inputs are on their way."""
        [each] = self._session.passes(kind, like, [tensors], needs_grad=needs_grad)
        staged = _Staged(each, self._bound.communicator)
        staged.go_on()
        return staged


_BEGUN, _COMPUTED, _OVER = 1, 2, 3
_STAGES = ("it has not begun", "it has begun", "it has been computed", "it is over")


class _Staged:
    """A pass that stops twice: where its inputs, and where its results are on their way."""

    def __init__(self, each: AttentionPass, communicator: Any) -> None:
        self.work: Any = each
        self.stage = 0
        self._steps: Iterator[None] = each.run(communicator, pauses=each.turning_points())

    def go_on(self) -> None:
        """To the next stop, or to the end."""
        with torch.no_grad():
            ended = next(self._steps, _ENDED) is _ENDED
        self.stage += 1
        assert ended == (self.stage == _OVER)


_ENDED = object()


def _no_gradient(like: Tensor) -> Tensor:
    """What stands for a gradient between two parts of a turn, which nobody reads."""
    return like.new_zeros(()).expand(like.shape)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, turn: Turn, q: Tensor, kv: Tensor) -> Any:
        turn._session.check(q, kv, turn._sink)
        turn._forward = turn._begin(
            ForwardPass, q, needs_grad=any(ctx.needs_input_grad), q=q, kv=kv, sink=turn._sink
        )
        ctx.turn = turn
        return q.view_as(q), kv.view_as(kv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        staged = ctx.turn._backward
        staged.go_on()
        ctx.turn._backward = None
        return None, staged.work.result_q, staged.work.result_kv


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, turn: Turn, q: Tensor, kv: Tensor) -> Any:
        assert turn._forward is not None
        turn._forward.go_on()
        ctx.turn = turn
        return q.view_as(q), kv.view_as(kv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_kv: Tensor) -> Any:
        ctx.turn._backward.go_on()
        return None, grad_q, grad_kv


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, turn: Turn, q: Tensor, kv: Tensor, sink: Tensor | None) -> Any:
        staged = turn._forward
        assert staged is not None
        staged.go_on()
        out, lse = staged.work.result_out, staged.work.result_lse
        staged.work = None  # its buffers
        ctx.turn = turn
        return save_results(ctx, q, kv, sink, out, lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> Any:
        tensors, grad_sink = saved_results(ctx, grad_out)
        q, kv = tensors["q"], tensors["kv"]
        ctx.turn._backward = ctx.turn._begin(BackwardPass, q, needs_grad=True, **tensors)
        return None, _no_gradient(q), _no_gradient(kv), grad_sink
