"""Measuring micro-batches on the ranks that will train, all groups at once, as they will run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcp.datacentric.buckets import Bucket
from dcp.datacentric.profile import LayerCost, Measurement
from dcp.datacentric.sequence_group import CheckedGroup, PeerFailed, SequenceGroup
from dcp.datacentric.sums import sum_over_ranks
from dcp.datacentric.workload import Workload, keep_activations_of
from dcp.runtime.communicator import GroupCommunicator

_FIELDS = ("forward_seconds", "backward_seconds", "input_bytes", "activation_bytes")


class SavedBytes:
    """Counts what autograd saves: bytes of distinct storages, weights and inputs left out."""

    def __init__(self, without: list[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in without}
        self.num_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor


class LayerProbe:
    """Hooks on layers that time their passes and count what they save."""

    def __init__(self, layers: dict[str, list[nn.Module]], device: torch.device) -> None:
        self._device, self._started, self._counting = device, 0.0, SavedBytes([])
        self._found: dict[str, list[list[float]]] = {kind: [] for kind in layers}
        self._handles: list[Any] = []
        for kind, members in layers.items():
            for layer in members:
                self._watch(kind, layer)

    def costs(self) -> dict[str, LayerCost]:
        """Of one layer of each kind: least seconds, most bytes."""
        costs = {}
        for kind, rows in self._found.items():
            forward, backward, inputs, saved = zip(*rows, strict=True)
            costs[kind] = LayerCost(min(forward), min(backward), int(max(inputs)), int(max(saved)))
        return costs

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, kind: str, layer: nn.Module) -> None:
        row = [0.0] * 4
        self._found[kind].append(row)

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            row[2] = given[0].numel() * given[0].element_size()
            self._counting = SavedBytes([*given, *module.parameters()])
            self._counting.__enter__()
            self._started = now(self._device)

        def after(*_: Any) -> None:
            row[0] = now(self._device) - self._started
            self._counting.__exit__(None, None, None)
            row[3] = self._counting.num_bytes

        def before_backward(*_: Any) -> None:
            self._started = now(self._device)

        def after_backward(*_: Any) -> None:
            row[1] = now(self._device) - self._started

        self._handles += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
            layer.register_full_backward_pre_hook(before_backward),
            layer.register_full_backward_hook(after_backward),
        ]


class Meter:
    """Measures micro-batches of a workload; every rank must call it with the same arguments."""

    def __init__(
        self,
        workload: Workload,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        depth: int | None,
        autocast: bool = False,
    ) -> None:
        self.workload, self.group, self.device, self.autocast = workload, group, device, autocast
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.model = workload.build(depth).train()
        self.layers = workload.layers(self.model)
        self._communicator = GroupCommunicator(group)

    def measure(self, bucket: Bucket, degree: int, batch_size: int) -> Measurement | None:
        """The slowest rank's figures; None where memory ran out on one.

        As many groups as there are ranks for run side by side; ranks left over wait.
        """
        first = self.rank // degree * degree
        numbers = [0.0] * (2 + len(_FIELDS) * len(self.layers))
        error: Exception | None = None
        if first + degree <= self.num_ranks:
            ranks = (first, degree, self.rank, self._communicator)
            try:
                self._rehearse(bucket, batch_size, CheckedGroup(*ranks))
                numbers = self._run(bucket, batch_size, SequenceGroup(*ranks))
            except Exception as raised:
                error = raised
                self.model.zero_grad()
        if self._out_of_memory(error, f"a micro-batch of {batch_size} {bucket.name!r}"):
            return None
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        seconds, peak, *rest = shared.tolist()
        costs = {}
        for kind in self.layers:
            forward, backward, inputs, saved = rest[: len(_FIELDS)]
            costs[kind] = LayerCost(forward, backward, int(inputs), int(saved))
            rest = rest[len(_FIELDS) :]
        return Measurement(seconds, int(peak), costs)

    def _out_of_memory(self, error: Exception | None, what: str) -> bool:
        """Whether memory ran out on any rank; collective. Any other error is raised, on all."""
        scarce, silent = is_out_of_memory(error), error is None or isinstance(error, PeerFailed)
        failed = 0 if scarce or silent else self.rank + 1
        shared = torch.tensor([int(scarce), failed], device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        anywhere, culprit = shared.tolist()
        if failed and error is not None:
            raise error
        if culprit:
            raise RuntimeError(f"rank {culprit - 1} failed when {what} was measured")
        return bool(anywhere)

    def _rehearse(self, bucket: Bucket, batch_size: int, own: CheckedGroup) -> None:
        """The pass that takes most memory, once: what fails on one rank stops its whole group."""
        try:
            batch = self.workload.stand_in(bucket, batch_size)
            self._keep_everything()
            self._pass(batch, own)
        except PeerFailed:
            raise
        except Exception:
            with suppress(PeerFailed):
                own.meet(self.device, failed=True)
            raise
        own.meet(self.device)

    def _keep_everything(self) -> None:
        keep_activations_of(self.layers, {kind: len(each) for kind, each in self.layers.items()})

    def _run(self, bucket: Bucket, batch_size: int, own: SequenceGroup) -> list[float]:
        batch = self.workload.stand_in(bucket, batch_size)
        self._keep_everything()
        probe = LayerProbe(self.layers, self.device)
        with SavedBytes([*self.model.parameters()]) as outside:
            self._pass(batch, own)
        probe.close()
        costs = probe.costs()
        keep_activations_of(self.layers, {})
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        before = self._allocated()
        started = now(self.device)
        self._pass(batch, own)
        seconds = now(self.device) - started
        if self.device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(self.device) - before)
        else:  # every layer's input, and one layer at a time recomputed
            inputs = sum(costs[kind].input_bytes * len(each) for kind, each in self.layers.items())
            saved = max((cost.activation_bytes for cost in costs.values()), default=0)
            peak = outside.num_bytes + inputs + saved
        return [seconds, peak] + [
            getattr(costs[kind], field) for kind in self.layers for field in _FIELDS
        ]

    def _pass(self, batch: Any, own: SequenceGroup) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.workload.summed_loss(self.model, batch, own)
        loss.backward()
        self.workload.release()
        self.model.zero_grad()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def measure_sync(self, model: nn.Module) -> float:
        """Seconds of adding up the gradients of ``model`` over all ranks; the faster of two."""
        seconds = []
        for _ in range(2):
            gradients, error = [], None
            try:
                gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
            except Exception as raised:
                error = raised
            if self._out_of_memory(error, "the sum of gradients"):
                raise ValueError("the model's gradients do not fit: use a smaller model")
            started = now(self.device)
            sum_over_ranks(gradients, self.group)
            seconds.append(now(self.device) - started)
        slowest = torch.tensor(min(seconds), dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self.group)
        return float(slowest)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def now(device: torch.device) -> float:
    """Seconds, when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


@contextmanager
def memory_cap(device: torch.device, fraction: float) -> Iterator[None]:
    """Let the allocator fail where the planned share of a GPU ends."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    yield
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
