"""Planned attention as a registered operator, so that ``torch.compile`` of a model has no break.

A compiled graph holds tensors and numbers only. So the executor is named by its handle, and a plan
by its ticket, a tensor: a bound plan gives it, a bare executor lets the operator choose, and it is
saved for backward. An executor keeps its last plans (:data:`dcp.runtime.regions.KEPT_PLANS`).
"""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dcp.runtime.kernels import finite, split_kv
from dcp.runtime.session import Call, Session


class Executor(Protocol):
    """What operators need of a :class:`dcp.AttentionExecutor` and of a plan bound to one."""

    handle: int
    ticket: Tensor | None

    def session(self, call: Call) -> Session: ...


class Registered(Protocol):
    """An executor that finds its plans by their tickets."""

    def bound(self, ticket: Tensor | None) -> Executor: ...


_executors: WeakValueDictionary[int, Registered] = WeakValueDictionary()
_handles = count()


def register(executor: Registered) -> int:
    """A handle by which operators find the executor for as long as it lives."""
    handle = next(_handles)
    _executors[handle] = executor
    return handle


def attention(
    executor: Executor, q: Tensor, kv: Tensor, sink: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """As :meth:`dcp.DCPAttention.apply_with_lse`, for code that is being compiled."""
    options = call.mask, call.scale, call.softcap, call.deterministic
    out, lse, _ = _attention(q, kv, sink, executor.ticket, executor.handle, *options)
    return out, lse


# Launches read a plan's tables: a CUDA graph would replay those of the plan of its capture.
_custom_op = partial(torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


@_custom_op("dcp::attention")
def _attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor | None,
    ticket: Tensor | None,
    executor: int,
    mask: str | None,
    scale: float | None,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bound = _executors[executor].bound(ticket)
    session = bound.session(Call(mask, scale, softcap, deterministic))
    out, lse = session.forward(q, kv, sink, needs_grad=True)
    assert bound.ticket is not None
    return out, lse, bound.ticket


@_attention.register_fake
def _(q: Tensor, kv: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:2], dtype=exact, device=q.device)
    shape = (*q.shape[:2], split_kv(kv, q.shape[-1])[1].shape[-1])
    return torch.empty(shape, dtype=q.dtype, device=q.device), lse, torch.empty(1).long()


@_custom_op("dcp::attention_backward")
def _backward(
    grad_out: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    ticket: Tensor,
    executor: int,
    mask: str | None,
    scale: float | None,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    call = Call(mask, scale, softcap, deterministic)
    session = _executors[executor].bound(ticket).session(call)
    return session.backward(grad_out=grad_out, q=q, kv=kv, out=out, lse=lse)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, kv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    grad_q, grad_kv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv))
    return grad_q, grad_kv


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, kv, sink, _, *ctx.call = inputs
    out, lse, ticket = output
    ctx.save_for_backward(q, kv, sink, out, lse, ticket)
    ctx.mark_non_differentiable(lse, ticket)


def _gradients(ctx: Any, grad_out: Tensor, *_: Any) -> tuple:
    q, kv, sink, out, lse, ticket = ctx.saved_tensors
    grad_q, grad_kv = _backward(grad_out.contiguous(), q, kv, out, lse, ticket, *ctx.call)
    grad_sink = sink_gradient(grad_out, sink, out, lse)
    return grad_q, grad_kv, grad_sink, None, *(None for _ in ctx.call)


_attention.register_autograd(_gradients, setup_context=_remember)


def sink_gradient(grad_out: Tensor, sink: Tensor | None, out: Tensor, lse: Tensor) -> Tensor | None:
    """``[heads]``: the sink is a key that every query sees, whose value is zero."""
    if sink is None:
        return None
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
    return -(torch.exp(sink.to(lse.dtype) - finite(lse)) * delta).sum(dim=0).to(sink.dtype)
