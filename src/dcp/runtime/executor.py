"""Planned attention on real ranks, and on all ranks of a plan inside one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property
from typing import Any, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dcp.plans import Plan
from dcp.program import RankPlan
from dcp.runtime import compiled
from dcp.runtime.communicator import Communicator, GroupCommunicator, LocalPost
from dcp.runtime.compiled import sink_gradient
from dcp.runtime.group import resolve_group
from dcp.runtime.kernels import KV, Kernel, get_kernel, pack_kv
from dcp.runtime.prepared import PreparedPlan
from dcp.runtime.regions import Plans
from dcp.runtime.rows import PINNING
from dcp.runtime.session import Call, CallOptions, Session
from dcp.runtime.timing import PassTimes
from dcp.simulate import Span


class AttentionExecutor:
    """Runs one rank's programs over a process group.

    Args:
        group: processes, one per rank of the plans: a ``torch.distributed`` group (gloo or NCCL)
            or a mesh of one axis; None as :func:`dcp.runtime.group.resolve_group` reads it.
        kernel: ``"auto"``, a name of :data:`dcp.runtime.kernels.KERNELS`, or a kernel of one's own.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        kernel: str | Kernel = "auto",
    ) -> None:
        group = resolve_group(group)
        self.rank = dist.get_rank(group) if group is not None else 0
        self.num_ranks = dist.get_world_size(group) if group is not None else 1
        self.kernel = kernel
        self.spans: list[Span] | None = None  # set to a list to record every call's instructions
        self.times: deque[PassTimes] | None = None  # set to a deque to note every pass's times
        self.handle = compiled.register(self)
        self.ticket: Tensor | None = None  # compiled code runs the plan in use, see BoundPlan
        self._plans = Plans()
        self.group = group
        self.communicator = GroupCommunicator(group) if group else LocalPost().rank(0)

    @property
    def plan(self) -> RankPlan | None:
        """The plan in use."""
        prepared = self._plans.last_used
        if prepared is not None and not torch.compiler.is_compiling():
            prepared = self._plans.in_use()
        return prepared.plan if prepared else None

    def prepare(self, plan: Plan | RankPlan | PreparedPlan | BoundPlan) -> None:
        """Use ``plan`` from now on. Calls already begun keep the plan they began with.

        What the kernel needs is built, and copied to the device, at the first call with a mask, or
        beforehand by :meth:`ready`. Raises ``ValueError`` for another rank's plan.
        """
        bound = plan if isinstance(plan, BoundPlan) else self.bind(plan)
        self._plans.use(bound.prepared)

    def bind(self, plan: Plan | RankPlan | PreparedPlan) -> BoundPlan:
        """``plan`` and this executor as one, to be given to a model in the executor's place.

        For whoever has several batches on the way, as pipelines do: nothing depends on the order of
        :meth:`prepare`, which need not be called. Where activation checkpointing repeats calls of
        the bare executor during backward, they get the plan of their forward pass if the region is
        one that :mod:`dcp.runtime.regions` knows, else they are refused.

        Raises ``ValueError`` for another rank's plan.
        """
        prepared = plan if isinstance(plan, PreparedPlan) else PreparedPlan(self._mine(plan))
        self._mine(prepared.plan)
        prepared.use_here()
        self._plans.add(prepared)
        return BoundPlan(self, prepared)

    def bound(self, ticket: Tensor | None = None) -> BoundPlan:
        """The plan that has ``ticket``; without one, that in use."""
        plans = self._plans
        return BoundPlan(self, plans.in_use() if ticket is None else plans.numbered(int(ticket)))

    def ready(
        self, plan: Plan | RankPlan, like: Tensor, *, call: Call | None = None
    ) -> PreparedPlan:
        """``plan`` with all its tables on the device, to be given to :meth:`prepare` later.

        For use ahead of time: while another batch is computed, in another thread or under another
        CUDA stream. ``like`` is any tensor of the dtype and on the device of the calls to come.
        """
        prepared = PreparedPlan(self._mine(plan))
        options = (call or Call()).options(prepared.plan.spec, needs_grad=True)
        kernel = get_kernel(self.kernel, like.device, like.dtype, options)
        for mask in prepared.plan.masks:
            for backward in (False, True):
                prepared.instructions(mask, like.device, backward=backward)
            prepared.work(mask, kernel, like.device, like.dtype)
        if like.device.type == "cuda":
            prepared.copied = torch.cuda.current_stream(like.device).record_event()
        return prepared

    def _mine(self, plan: Plan | RankPlan) -> RankPlan:
        if plan.num_ranks != self.num_ranks:
            raise ValueError(
                f"the plan is for {plan.num_ranks} ranks, the executor's group has "
                f"{self.num_ranks}: plan for a cluster of {self.num_ranks} devices, or make the "
                f"executor with a group of {plan.num_ranks}"
            )
        rank_plan = plan.rank_plan(self.rank) if isinstance(plan, Plan) else plan
        if rank_plan.rank != self.rank:
            raise ValueError(
                f"the plan is rank {rank_plan.rank}'s, this process is rank {self.rank} of "
                f"{self.num_ranks}: give it plan.rank_plan({self.rank})"
            )
        return rank_plan

    def attention(
        self, q: Tensor, kv: KV, *, sink: Tensor | None = None, **options: Unpack[CallOptions]
    ) -> Tensor:
        """:meth:`DCPAttention.apply` with this executor."""
        return DCPAttention.apply(self, q, kv, sink=sink, **options)

    def captured(
        self, q: Tensor, kv: Tensor, *, sink: Tensor | None = None, **options: Unpack[CallOptions]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """:meth:`attention` under the plan in use as CUDA graphs, for a plan that repeats.

        Forward and backward are captured, one graph each, so that a call costs the host two
        launches however many instructions the rank's programs have. Every rank of the group
        captures at the same time and then calls in the same order.

        Args:
            q, kv: samples, of the shapes, dtype and device of the calls to come, requiring
                gradients if those will.
            sink, options: as for :meth:`attention`.

        Returns a function of ``(q, kv)``. It keeps the plan of the capture, whatever is prepared
        later. Raises ``ValueError`` for tensors that are not on a CUDA device.
        """
        if q.device.type != "cuda":
            raise ValueError(f"CUDA graphs capture tensors on a CUDA device, q is on {q.device}")

        bound = self.bound()

        def attend(q: Tensor, kv: Tensor, sink: Tensor | None = None) -> Tensor:
            return bound.attention(q, kv, sink=sink, **options)

        # the sink is an argument of the graphs: a captured one would get no gradient
        sinks = () if sink is None else (sink,)
        with PINNING:
            graphs = cast(
                Callable[..., Tensor], torch.cuda.make_graphed_callables(attend, (q, kv, *sinks))
            )

        def replay(q: Tensor, kv: Tensor) -> Tensor:
            assert bound.prepared, "the graphs read its tables: it must live as long"
            return graphs(q, kv, *sinks)

        return replay

    def session(self, call: Call) -> Session:
        """A call with the plan in use."""
        return self.bound().session(call)


class BoundPlan:
    """One plan on an executor, from :meth:`AttentionExecutor.bind`.

    Given to a model where an executor is expected. Its calls run under its plan, in forward, in
    backward and when checkpointing repeats them, whatever the executor has prepared meanwhile.
    """

    def __init__(self, executor: AttentionExecutor, prepared: PreparedPlan) -> None:
        self.executor, self.prepared = executor, prepared
        self.handle = executor.handle
        self.ticket: Tensor | None = torch.tensor([prepared.number])  # names it in compiled code

    @cached_property
    def communicator(self) -> Communicator:
        """One of its own, for calls that others interrupt (:mod:`dcp.runtime.turns`)."""
        return copy(self.executor.communicator)

    @property
    def plan(self) -> RankPlan:
        """The rank's plan."""
        return self.prepared.plan

    def attention(
        self, q: Tensor, kv: KV, *, sink: Tensor | None = None, **options: Unpack[CallOptions]
    ) -> Tensor:
        """:meth:`DCPAttention.apply` under this plan."""
        return DCPAttention.apply(self, q, kv, sink=sink, **options)

    def session(self, call: Call) -> Session:
        """A call with this plan."""
        return Session(
            plans=[self.prepared],
            communicators=[self.executor.communicator],
            drive=_exhaust,
            split=lambda tensor, keys=False: [tensor],
            join=lambda tensors, keys=False: tensors[0],
            kernel=self.executor.kernel,
            spans=self.executor.spans,
            call=call,
            times=self.executor.times,
        )


class LocalWorld:
    """All ranks of a plan in this process, on any device: for tests, notebooks and one GPU.

    It stands beside dense attention, and so takes q, k and v in the global layout. Real ranks take
    the rows of ``kv`` as they travel, keys and values together: :class:`AttentionExecutor`.
    """

    def __init__(self, plan: Plan, *, kernel: str | Kernel = "auto") -> None:
        self.plan, self.kernel = plan, kernel
        self.spans: list[Span] | None = None  # set to a list to record every call's instructions
        self._prepared = [PreparedPlan(plan.rank_plan(rank)) for rank in range(plan.num_ranks)]

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        sink: Tensor | None = None,
        return_lse: bool = False,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Differentiable attention in the global layout.

        Args:
            q: ``[tokens, heads, head_dim]``; k: ``[keys, kv_heads, head_dim]``; v: ``[keys,
                kv_heads, value_dim]``, where the keys are the tokens' own and, before those of
                their sequence, the cached ones.
            sink, options: as for :meth:`DCPAttention.apply`.
            return_lse: also return the log-sum-exp ``[tokens, heads]`` (not differentiable).
        """
        out, lse = _attention(self, q, pack_kv((k, v)), sink, Call(**options))
        return (out, lse) if return_lse else out

    def session(self, call: Call) -> Session:
        """A call with the world's plan."""
        ranks = range(self.plan.num_ranks)
        post = LocalPost()
        return Session(
            plans=self._prepared,
            communicators=[post.rank(rank) for rank in ranks],
            drive=post.run,
            split=lambda tensor, keys=False: [
                self.plan.shard(rank, tensor, keys=keys) for rank in ranks
            ],
            join=self.plan.unshard,
            kernel=self.kernel,
            spans=self.spans,
            call=call,
        )


def save_results(
    ctx: Any, q: Tensor, kv: Tensor, sink: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """What a forward pass of attention returns, kept for :func:`saved_results`."""
    ctx.save_for_backward(q, kv, sink, out, lse)
    ctx.mark_non_differentiable(lse)
    return out, lse


def saved_results(ctx: Any, grad_out: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a backward pass needs, by name, and the sink's gradient, which is local."""
    q, kv, sink, out, lse = ctx.saved_tensors
    tensors = {"grad_out": grad_out, "q": q, "kv": kv, "out": out, "lse": lse}
    return tensors, sink_gradient(grad_out, sink, out, lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, world: Any, q: Tensor, kv: Tensor, sink: Tensor | None, call: Call
    ) -> Any:
        ctx.session = world.session(call)
        out, lse = ctx.session.forward(q, kv, sink, needs_grad=any(ctx.needs_input_grad))
        return save_results(ctx, q, kv, sink, out, lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> Any:
        tensors, grad_sink = saved_results(ctx, grad_out)
        return None, *ctx.session.backward(**tensors), grad_sink, None


_attention = _Attention.apply


def _attend(
    executor: AttentionExecutor | BoundPlan,
    q: Tensor,
    kv: KV,
    sink: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    kv = pack_kv(kv)
    if torch.compiler.is_compiling():
        return compiled.attention(executor, q, kv, sink, call)
    return _attention(executor, q, kv, sink, call)


class DCPAttention:
    """Planned attention as one differentiable operation."""

    @staticmethod
    def apply(
        executor: AttentionExecutor | BoundPlan,
        q: Tensor,
        kv: KV,
        *,
        sink: Tensor | None = None,
        **options: Unpack[CallOptions],
    ) -> Tensor:
        """Attention of the rank's own tokens under the executor's plan.

        Every rank of the group calls it, ranks without tokens too.

        Args:
            executor: with a prepared plan, or a plan bound to one: :meth:`AttentionExecutor.bind`.
            q: ``[local, heads, head_dim]``, rows in the order of ``plan.token_indices(rank)``.
            kv: keys ``[local keys, kv_heads, head_dim]`` and values ``[…, value_dim]`` as a pair,
                or in one tensor: ``[local keys, 2, kv_heads, head_dim]``, or where the widths
                differ ``[local keys, kv_heads, head_dim + value_dim]``. As many rows as ``q``, and
                those of the rank's cached tokens, as ``plan.key_indices(rank)`` orders them.
            sink: ``[heads]``, a learned score that joins each row's sum of weights and carries no
                value. The same on all ranks; its gradient is that of the rank's own tokens, to be
                summed over ranks like every parameter's.
            options: see :class:`dcp.runtime.session.CallOptions`.

        Returns ``[local, heads, value_dim]``. Raises ``ValueError`` for wrong shapes or dtypes, for
        a mask the plan does not have, and for what no kernel can honour.
        """
        return _attend(executor, q, kv, sink, Call(**options))[0]

    @staticmethod
    def apply_with_lse(
        executor: AttentionExecutor | BoundPlan,
        q: Tensor,
        kv: KV,
        *,
        sink: Tensor | None = None,
        **options: Unpack[CallOptions],
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`apply`, with the natural log-sum-exp ``[local, heads]`` (no gradient), the sink
        counted in."""
        return _attend(executor, q, kv, sink, Call(**options))


def _exhaust(programs: list[Iterator[None]]) -> None:
    for program in programs:
        for _ in program:
            raise AssertionError("a program on its own rank has nobody to yield to")
