"""Planned attention as a registered operator, so that ``torch.compile`` of a model has no break.

A compiled graph holds tensors and numbers only. The executor is therefore named by its handle, and
the plan that a forward call used by a ticket, a tensor saved for the backward call. An executor
keeps its last plans by ticket (:data:`dcp.runtime.executor.KEPT_PLANS`).
"""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dcp.runtime.kernels import split_kv
from dcp.runtime.kernels.cellwise import finite
from dcp.runtime.session import Call, Session


class Executor(Protocol):
    """What operators need of a :class:`dcp.AttentionExecutor`: its name here, its plan in use."""

    handle: int
    ticket: int

    def session(self, call: Call, *, ticket: int | None = None) -> Session: ...


_executors: WeakValueDictionary[int, Executor] = WeakValueDictionary()
_handles = count()


def register(executor: Executor) -> int:
    """A handle by which operators find the executor for as long as it lives."""
    handle = next(_handles)
    _executors[handle] = executor
    return handle


def attention(
    executor: Executor, q: Tensor, kv: Tensor, sink: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """As :meth:`dcp.DCPAttention.apply_with_lse`, for code that is being compiled."""
    out, lse, _ = _attention(
        q, kv, sink, executor.handle, call.mask, call.scale, call.softcap, call.deterministic
    )
    return out, lse


# Launches read a plan's tables: a CUDA graph would replay those of the plan of its capture.
_custom_op = partial(torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


@_custom_op("dcp::attention")
def _attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor | None,
    executor: int,
    mask: str | None,
    scale: float | None,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call, ticket = Call(mask, scale, softcap, deterministic), _executors[executor].ticket
    session = _executors[executor].session(call)
    out, lse = session.forward(q, kv, sink, needs_grad=True)
    return out, lse, torch.tensor([ticket])


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
    session = _executors[executor].session(call, ticket=int(ticket))
    return session.backward(grad_out=grad_out, q=q, kv=kv, out=out, lse=lse)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, kv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    grad_q, grad_kv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv))
    return grad_q, grad_kv


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, kv, sink, *ctx.call = inputs
    out, lse, ticket = output
    ctx.save_for_backward(q, kv, sink, out, lse, ticket)
    ctx.mark_non_differentiable(lse, ticket)


def _gradients(ctx: Any, grad_out: Tensor, *_: Any) -> tuple:
    q, kv, sink, out, lse, ticket = ctx.saved_tensors
    grad_q, grad_kv = _backward(grad_out.contiguous(), q, kv, out, lse, ticket, *ctx.call)
    grad_sink = None if sink is None else sink_gradient(grad_out, sink, out, lse)
    return grad_q, grad_kv, grad_sink, *(None for _ in ctx.call)


_attention.register_autograd(_gradients, setup_context=_remember)


def sink_gradient(grad_out: Tensor, sink: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """``[heads]``: the sink is a key that every query sees, whose value is zero."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
    return -(torch.exp(sink.to(lse.dtype) - finite(lse)) * delta).sum(dim=0).to(sink.dtype)
