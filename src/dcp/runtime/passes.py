"""The two passes of attention over a rank's program: forward and backward.

A pass owns the rank's buffers and knows what each instruction means; how messages travel is the
communicator's business. Buffers are ``[rows, …]``, a row being one token of one head group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dcp.program import Copy, Wait
from dcp.runtime.communicator import Communicator
from dcp.runtime.kernels import Kernel, Options, finite
from dcp.runtime.packing import Part, in_place, packed, unpacked
from dcp.runtime.prepared import Division, Exchange, Fold, Message, PreparedPlan, Step
from dcp.runtime.rows import Rows
from dcp.runtime.timing import Moment, PassTimes, moment
from dcp.simulate import COMPUTE, TRANSFER, Span
from dcp.transfers import DKV, KV, OUT, Q

Field = tuple[Tensor, torch.dtype]  # a buffer's tensor [rows, …] and the dtype it travels in
_SHOWN = {Division: "attention", Fold: "reduce"}  # as the plan's instructions are called
Key = slice | Tensor  # one run of rows, or row numbers


class AttentionPass:
    """What both passes share: buffers, messages, and the loop over instructions."""

    backward = False

    def __init__(
        self,
        prepared: PreparedPlan,
        mask: str | None,
        kernel: Kernel,
        like: Tensor,
        options: Options,
    ) -> None:
        plan = prepared.plan
        self.prepared, self.mask = prepared, mask
        self.kernel, self.options = kernel, options
        self.device, self.dtype = like.device, like.dtype
        self.input_dtype = kernel.input_dtype(like.dtype)
        self.compute_dtype = kernel.compute_dtype(like.dtype)
        spec = plan.spec
        self.groups = plan.num_head_groups
        self.kv_groups = min(self.groups, spec.num_kv_heads)
        heads = spec.num_heads // self.groups
        self.q_shape, self.out_shape = (heads, spec.head_dim), (heads, spec.value_dim)
        self.kv_shape = spec.kv_shape(spec.num_kv_heads // self.kv_groups)
        # of Q and OUT rows, and of KV and DKV rows: cached tokens have only the latter
        self.num_tokens = (plan.num_local_tokens, plan.num_local_keys)
        self.rank = plan.rank
        program = plan.mask_program(mask)
        self.num_rows, self.gradients_hop = prepared.num_rows(mask), program.gradients_hop
        self.instructions = prepared.instructions(mask, like.device, backward=self.backward)
        self.work = prepared.work(mask, kernel, like.device, like.dtype)
        kinds = [type(each) for each in self.instructions]
        # every result row is written once and stays here: it needs no wider dtype on the way
        self.once = kernel.writes_once and options.deterministic
        self.once &= kinds.count(Division) <= 1 and Exchange not in kinds
        self.fields: dict[int, list[Field]] = {}
        # partial results by peer and buffer, and then by field
        self.arrived: dict[tuple[int, int], dict[int, Tensor]] = {}
        self.spans: list[Span] | None = None  # set to record what takes how long
        self.times: PassTimes | None = None  # set to note when, on the device's own clock

    def turning_points(self) -> tuple[int, int]:
        """The instructions after which the first inputs, and the last results, are on their way."""
        launches = [i for i, each in enumerate(self.instructions) if isinstance(each, Exchange)]
        return (launches[0], launches[-1]) if launches else (0, len(self.instructions) - 1)

    def run(self, communicator: Communicator, *, pauses: Sequence[int] = ()) -> Iterator[None]:
        """Run the program; yields while a wait needs other ranks of this process to go on, and
        after the instructions that are ``pauses``."""
        communicator.open(self.device, self.prepared, self._facts())
        in_flight: dict[int, tuple[float, Moment, Iterator[None]]] = {}  # since when
        if self.times is not None:
            self.times.began = self._now()
        for index, instruction in enumerate(self.instructions):
            began, come = perf_counter(), self._now()
            match instruction:
                case Exchange(step):
                    transfer = self._launch(instruction, communicator)
                    in_flight[step] = began, self._now(), transfer
                    self._note("packing", come)
                case Wait(step):
                    began, launched, transfer = in_flight.pop(step)
                    yield from transfer
                    self._record(TRANSFER, instruction, began)
                    if self.times is not None:
                        self.times.transfers.append((step, launched, come, self._now()))
                case _:
                    self._compute(instruction)
                    self._record(COMPUTE, instruction, began)
                    if isinstance(instruction, Division):
                        self._note("attention", come)
            for _ in range(pauses.count(index)):
                yield
        if self.times is not None:
            self.times.ended = self._now()

    def new_times(self) -> PassTimes:
        """Where to note the times of this pass."""
        plan = self.prepared.plan
        mask = self.mask or next(iter(plan.masks))
        return PassTimes(plan.fingerprint, mask, self.backward, None)

    def _now(self) -> Moment:
        return None if self.times is None else moment(self.device)

    def _note(self, what: str, began: Moment) -> None:
        if self.times is not None:
            getattr(self.times, what).append((began, self._now()))

    def _facts(self) -> dict[str, Any]:
        """What decides which messages travel, and what they mean: the same on all ranks."""
        plan, options = self.prepared.plan, self.options
        return {
            "plan": (f"{plan.fingerprint:016x}", plan.stats.strategy, plan.num_tokens),
            "mask": self.mask or next(iter(plan.masks)),
            "dtype": self.dtype,
            "device": self.device.type,
            "accumulated in": self.compute_dtype,
            "pass": "backward" if self.backward else "forward",
            "needs_grad": options.needs_grad,
            "scale": options.scale,
            "softcap": options.softcap or False,
            "deterministic": options.deterministic,
        }

    def _compute(self, instruction: Step) -> None:
        """What the rank does by itself."""
        match instruction:
            case Copy(direction="load"):
                self.load()
            case Division(step, clears):
                for buffer, rows in clears:
                    for key in rows.keys:
                        self.clear(buffer, key)
                self.attend(self.work[step])
            case Fold(_, targets):
                for peer, buffer, rows in targets:
                    fields = sorted(self.arrived.pop((peer, buffer)).items())
                    self.reduce(buffer, rows, *(values for _, values in fields))
            case Copy(direction="store"):
                self.store()

    def _record(self, track: str, instruction: Step, began: float) -> None:
        if self.spans is not None:
            step = getattr(instruction, "step", "")
            pass_name = "backward" if self.backward else "forward"
            kind = _SHOWN.get(type(instruction)) or type(instruction).__name__.lower()
            name = f"{pass_name}: {kind} {step}".rstrip()
            self.spans.append(Span(self.rank, track, name, began, perf_counter()))

    # What a pass defines.

    def load(self) -> None:
        """Bring the rank's tensors into its buffers, and clear its own results."""

    def store(self) -> None:
        """Take the results out of the buffers."""

    def attend(self, work: Any) -> None:
        """One division: one launch of the kernel."""

    def reduce(self, buffer: int, rows: Rows, *arrived: Tensor) -> None:
        """Fold partial results that arrived, a tensor for each field, into the rank's own."""

    # Buffers.

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of a buffer or a message, not initialised."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def results(self, buffer: int, *shape: int, exact: bool = True) -> Field:
        """An uninitialised buffer; inexact ones travel in the tensors' dtype."""
        rows = self.num_rows[buffer]
        held = self.dtype if self.once and not exact else self.compute_dtype
        tensor = self.empty((rows, *shape), held)
        return tensor, self.compute_dtype if exact else self.dtype

    def inputs(self, buffer: int, tensor: Tensor, groups: int, *, exact: bool = False) -> Field:
        """A buffer whose own rows are the local tensor ``[tokens, …, groups * heads, d]`` (or
        ``[tokens, groups * heads]``): the tensor itself where it is laid out so already."""
        dtype = self.compute_dtype if exact else self.input_dtype
        tensor, rows = tensor.detach(), self.num_rows[buffer]
        travels = dtype if exact else self.dtype
        if groups == 1 and rows == len(tensor) and tensor.dtype == dtype:
            return tensor.contiguous(), travels
        heads_dim = 1 if tensor.dim() == 2 else tensor.dim() - 2
        split = tensor.unflatten(heads_dim, (groups, -1)).movedim(heads_dim, 0)
        field = self.empty((rows, *split.shape[2:]), dtype)
        field[: groups * len(tensor)].unflatten(0, (groups, len(tensor))).copy_(split)
        return field, travels

    def own(self, buffer: int) -> slice:
        """The rows of the rank's own tokens."""
        groups = (self.groups, self.kv_groups)[buffer % 2]
        return slice(0, groups * self.num_tokens[buffer % 2])

    def take(self, buffer: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The own rows as a local tensor: inverse of :meth:`inputs`."""
        heads_dim = 1 if rows.dim() == 2 else rows.dim() - 2
        groups = (self.groups, self.kv_groups)[buffer % 2]
        own = rows[self.own(buffer)].unflatten(0, (groups, self.num_tokens[buffer % 2]))
        joined = own.movedim(0, heads_dim).flatten(heads_dim, heads_dim + 1)
        taken = joined.to(dtype).contiguous()
        shares = taken.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        # a view would keep the rows of all that came from elsewhere
        return taken.clone() if shares and taken.numel() < rows.numel() else taken

    def clear(self, buffer: int, rows: Key) -> None:
        """Make partial results empty."""
        for tensor, _ in self.fields[buffer]:
            tensor[rows] = 0

    # Messages.

    def _launch(self, exchange: Exchange, communicator: Communicator) -> Iterator[None]:
        """Start a communication. Rows that are sent and inputs that arrive are touched by nobody
        else until its wait (see :mod:`dcp.compile`), so that one run of them, in the dtype in which
        it travels, is itself the message."""
        sends = {}
        for message in exchange.sends:
            parts = self._parts(message)
            lying = in_place(parts)
            sends[message[0]] = packed(parts) if lying is None else lying
        receives, parts_of = {}, {}
        for message in exchange.receives:
            peer, parts = message[0], self._parts(message)
            lying = None if parts[0].buffer >= OUT else in_place(parts)
            if lying is None:
                parts_of[peer] = parts
                size = sum(part.num_bytes for part in parts)
                lying = self.empty([size], torch.uint8)
            receives[peer] = lying
        return self._complete(communicator.launch(sends, receives), receives, parts_of)

    def _complete(
        self,
        transfer: Iterator[None],
        receives: dict[int, Tensor],
        parts_of: dict[int, list[Part]],
    ) -> Iterator[None]:
        """Inputs go to their rows, partial results wait for their :class:`Fold`."""
        yield from transfer
        for peer, parts in parts_of.items():
            for part, values in unpacked(receives[peer], parts):
                if part.buffer < OUT:
                    part.rows.put(part.tensor, values)
                else:
                    self.arrived.setdefault((peer, part.buffer), {})[part.field] = values

    def _parts(self, message: Message) -> list[Part]:
        """A message field by field, widest elements first: all stay aligned in it."""
        parts = [
            Part(buffer, index, *field, rows)
            for buffer, rows in message[1]
            for index, field in enumerate(self.fields[buffer])
        ]
        return sorted(parts, key=lambda part: -part.dtype.itemsize)


class ForwardPass(AttentionPass):
    """``out [tokens, heads, value_dim]`` and ``lse [tokens, heads]`` of the rank's own tokens.

    A ``sink [heads]`` joins the sum of weights once, here, where the rows are whole.
    """

    def __init__(self, *args: Any, q: Tensor, kv: Tensor, sink: Tensor | None = None) -> None:
        super().__init__(*args)
        self.tensors, self.sink = (q, kv), sink
        self.once &= sink is None  # which scales the results once more

    def load(self) -> None:
        self.fields = {
            Q: [self.inputs(Q, self.tensors[0], self.groups)],
            KV: [self.inputs(KV, self.tensors[1], self.kv_groups)],
            OUT: [
                self.results(OUT, *self.out_shape, exact=False),
                self.results(OUT, self.out_shape[0]),
            ],
        }
        [(self.q, _)], [(self.kv, _)], [(self.out, _), (self.lse, _)] = self.fields.values()
        self.clear(OUT, self.own(OUT))

    def clear(self, buffer: int, rows: Key) -> None:
        self.out[rows], self.lse[rows] = 0, -torch.inf

    def attend(self, work: Any) -> None:
        self.kernel.forward(work, self.q, self.kv, self.out, self.lse, self.options)

    def reduce(self, buffer: int, rows: Rows, *arrived: Tensor) -> None:
        for key, *parts in zip(rows.keys, *map(rows.split, arrived), strict=True):
            out, lse = self.out[key], self.lse[key]
            self.kernel.merge(out, lse, *parts)
            if isinstance(key, Tensor):  # they were gathered
                self.out[key], self.lse[key] = out, lse

    def store(self) -> None:
        if self.sink is None:
            self.result_out = self.take(OUT, self.out, self.dtype)
            self.result_lse = self.take(OUT, self.lse, self.compute_dtype)
            return
        out = self.take(OUT, self.out, self.compute_dtype)
        lse = self.take(OUT, self.lse, self.compute_dtype)
        self.result_lse = torch.logaddexp(lse, self.sink.to(self.compute_dtype))
        weight = torch.exp(lse - finite(self.result_lse))
        self.result_out = (out * weight[..., None]).to(self.dtype)


class BackwardPass(AttentionPass):
    """``grad_q`` ``[tokens, heads, head_dim]``, and ``grad_kv`` of the shape of ``kv``.

    Flash-attention's backward by blocks: every block needs only the global log-sum-exp and
    delta = sum(grad_out * out) of its rows (FlashAttention-2, arXiv 2307.08691, section 3.1).
    """

    backward = True

    def __init__(
        self, *args: Any, grad_out: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        super().__init__(*args)
        self.tensors = (q, grad_out, lse, self.kernel.delta(grad_out, out), kv)

    def load(self) -> None:
        q, grad_out, lse, delta, kv = self.tensors
        self.fields = {
            Q: [
                self.inputs(Q, q, self.groups),
                self.inputs(Q, grad_out, self.groups),
                self.inputs(Q, lse, self.groups, exact=True),
                self.inputs(Q, delta, self.groups, exact=True),
            ],
            KV: [self.inputs(KV, kv, self.kv_groups)],
            OUT: [self.results(OUT, *self.q_shape, exact=False)],
            DKV: [self.results(DKV, *self.kv_shape, exact=self.gradients_hop)],
        }
        *self.q_side, self.kv, self.grad_q, self.grad_kv = (
            tensor for fields in self.fields.values() for tensor, _ in fields
        )
        self.clear(OUT, self.own(OUT))
        self.clear(DKV, self.own(DKV))

    def attend(self, work: Any) -> None:
        self.kernel.backward(work, self.q_side, self.kv, self.grad_q, self.grad_kv, self.options)

    def reduce(self, buffer: int, rows: Rows, *arrived: Tensor) -> None:
        [(grad, _)], [more] = self.fields[buffer], arrived
        rows.add(grad, more)

    def store(self) -> None:
        self.result_q = self.take(OUT, self.grad_q, self.dtype)
        self.result_kv = self.take(DKV, self.grad_kv, self.dtype)
