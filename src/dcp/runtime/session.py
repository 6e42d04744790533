"""One call of planned attention: what it asks for, and the programs it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, TypedDict

import torch
from torch import Tensor

from dcp.batch import AttentionSpec
from dcp.runtime.communicator import Communicator
from dcp.runtime.kernels import Kernel, Options, get_kernel
from dcp.runtime.passes import AttentionPass, BackwardPass, ForwardPass
from dcp.runtime.prepared import PreparedPlan
from dcp.runtime.timing import PassTimes
from dcp.simulate import Span


class CallOptions(TypedDict, total=False):
    """What one call of attention may ask for, beside its tensors: the keywords of every call.

    Keys:
        mask: a mask name of the batch; the first by default.
        scale: of the scores, positive; ``head_dim ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(scores / softcap)``; none by default.
        deterministic: equal bits in every run; False lets the kernel add gradients in any order.
        dropout: of attention weights; refused, it would differ from that of one rank.
    """

    mask: str | None
    scale: float | None
    softcap: float | None
    deterministic: bool
    dropout: float


@dataclass(frozen=True)
class Call:
    """:class:`CallOptions`, checked and complete."""

    mask: str | None = None
    scale: float | None = None
    softcap: float | None = None
    deterministic: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout} of attention weights is not offered: pass dropout=0.0"
            )
        for name, value, default in (
            ("scale", self.scale, "head_dim ** -0.5"),
            ("softcap", self.softcap, "none"),
        ):
            if value is not None and not 0 < value < inf:
                raise ValueError(
                    f"{name} must be positive and finite, or None for {default}, got {value}"
                )

    def options(self, spec: AttentionSpec, *, needs_grad: bool) -> Options:
        """The same for a kernel."""
        scale = spec.head_dim**-0.5 if self.scale is None else float(self.scale)
        return Options(
            spec.head_dim, scale, self.softcap, self.deterministic, needs_grad, spec.value_dim
        )


@dataclass(frozen=True)
class Session:
    """One call of attention: the plan it began with, for as long as autograd may come back to it.

    A session runs the programs of the ranks that this process hosts: one of a process group, or
    all of a :class:`LocalWorld`.
    """

    plans: list[PreparedPlan]
    communicators: list[Communicator]
    drive: Callable[[list[Iterator[None]]], None]
    split: Callable[..., list[Tensor]]
    join: Callable[..., Tensor]
    kernel: str | Kernel
    spans: list[Span] | None
    call: Call
    times: deque[PassTimes] | None = None

    def forward(
        self, q: Tensor, kv: Tensor, sink: Tensor | None, *, needs_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """``out [tokens, heads, value_dim]`` and the natural log-sum-exp ``[tokens, heads]``."""
        self.check(q, kv, sink)
        shards = self.split(q), self.split(kv, keys=True)
        out, lse = self.forward_shards(*shards, sink, needs_grad=needs_grad)
        return self.join(out), self.join(lse)

    def forward_shards(
        self, q: list[Tensor], kv: list[Tensor], sink: Tensor | None, *, needs_grad: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """:meth:`forward` with one tensor per rank that this process hosts."""
        pairs = zip(q, kv, strict=True)
        inputs = [{"q": q_, "kv": kv_, "sink": sink} for q_, kv_ in pairs]
        passes = self._run(ForwardPass, q[0], inputs, needs_grad=needs_grad)
        return [p.result_out for p in passes], [p.result_lse for p in passes]

    def backward(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``q`` and ``kv`` from ``grad_out``, ``q``, ``kv``, ``out`` and ``lse``."""
        shards = {name: self.split(each, keys=name == "kv") for name, each in tensors.items()}
        per_rank = [
            dict(zip(shards, parts, strict=True)) for parts in zip(*shards.values(), strict=True)
        ]
        passes = self._run(BackwardPass, tensors["q"], per_rank, needs_grad=True)
        grad_q, grad_kv = [p.result_q for p in passes], [p.result_kv for p in passes]
        return self.join(grad_q), self.join(grad_kv, keys=True)

    def passes(
        self, kind: type[AttentionPass], like: Tensor, inputs: list[dict], *, needs_grad: bool
    ) -> list[Any]:
        """A pass for every rank that this process hosts, not begun."""
        options = self.call.options(self.plans[0].plan.spec, needs_grad=needs_grad)
        kernel = get_kernel(self.kernel, like.device, like.dtype, options)
        passes = [
            kind(plan, self.call.mask, kernel, like, options, **tensors)
            for plan, tensors in zip(self.plans, inputs, strict=True)
        ]
        for each in passes:
            each.spans = self.spans
            if self.times is not None:
                each.times = each.new_times()
                self.times.append(each.times)
        return passes

    def _run(
        self, kind: type[AttentionPass], like: Tensor, inputs: list[dict], *, needs_grad: bool
    ) -> list[Any]:
        passes = self.passes(kind, like, inputs, needs_grad=needs_grad)
        with torch.no_grad():
            self.drive([p.run(c) for p, c in zip(passes, self.communicators, strict=True)])
        return passes

    def check(self, q: Tensor, kv: Tensor, sink: Tensor | None) -> None:
        """Raise ``ValueError`` for tensors that the plan is not for."""
        plans = [prepared.plan for prepared in self.plans]
        spec = plans[0].spec
        tokens = sum(plan.num_local_tokens for plan in plans)
        keys = sum(plan.num_local_keys for plan in plans)
        wanted = {
            "q": (q, (tokens, spec.num_heads, spec.head_dim)),
            "kv": (kv, (keys, *spec.kv_shape())),
            "sink": (sink, (spec.num_heads,)),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the plan needs {shape}")
        if q.dtype != kv.dtype or q.device != kv.device:
            raise ValueError(f"q is {q.dtype} on {q.device}, kv {kv.dtype} on {kv.device}")
