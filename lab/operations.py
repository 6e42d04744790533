"""What surrounds the kernels of a pass on a GPU: operations that launch something, and bytes.

Packing, clearing, merging and conversion, counted as torch dispatches them while a rank's program
runs without kernels and messages. Views and allocations are free; what Triton's kernels do in one
pass over memory (delta, merging) counts as one operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.alone import Alone
from dcp.bench.host import PLAN_CLUSTER, PLAN_TOKENS, long_tailed
from dcp.planner import plan
from dcp.program import MaskProgram
from dcp.runtime.kernels import Kernel, Options

SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
STRATEGIES = ("bisection", "hypergraph", "zigzag")
EVERY = 4  # a rank of so many is counted
# Whose first argument is written without being read, or read and written a row at a time.
_OVERWRITE = {"copy_", "fill_", "zero_"}
_SOME_ROWS = {"index_select", "index", "index_copy_", "index_put_", "index_add_"}


class Operations(TorchDispatchMode):
    """Counts operations and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.note(name, _bytes(name, args, result))
        return result

    def note(self, name: str, num_bytes: int) -> None:
        self.count[name] += 1
        self.bytes += num_bytes


class NoKernel(Kernel):
    """Computes nothing."""

    name = "none"

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        return None

    def prepare(
        self, program: MaskProgram, device: torch.device, **_: Any
    ) -> dict[int, dict[int, Any]]:
        return {step: {} for step in range(program.num_steps + 1)}

    def forward(self, *_: Any) -> None:
        """Nothing."""

    def backward(self, *_: Any) -> None:
        """Nothing."""


class FusedKernel(NoKernel):
    """No attention, and the passes over memory that Triton's kernels need beside it."""

    def __init__(self, seen: Operations) -> None:
        self.seen = seen

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        sums = torch.empty(grad_out.shape[:-1], dtype=torch.float32)
        self.seen.note("delta", grad_out.nbytes + out.nbytes + sums.nbytes)
        return sums

    def merge(self, out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
        self.seen.note("merge", 3 * (out.nbytes + lse.nbytes))


def count_operations() -> Iterator[dict[str, Any]]:
    """Operations and megabytes of a pass, the median of ranks, by strategy."""
    batch = SequenceBatch(long_tailed(PLAN_TOKENS, seed=0))
    for strategy in STRATEGIES:
        made = plan(batch, SPEC, PLAN_CLUSTER, strategy=strategy)
        counts: dict[str, list[Operations]] = {"forward": [], "backward": []}
        for rank in range(0, made.num_ranks, EVERY):
            seen = Operations(), Operations()
            kernel = FusedKernel(seen[0])
            plain = torch.device("cpu"), torch.bfloat16
            alone = Alone(made.rank_plan(rank), kernel, *plain, filled=False)
            with seen[0]:
                found = alone.forward()
            kernel.seen = seen[1]
            with seen[1]:
                alone.backward(*found)
            for name, each in zip(counts, seen, strict=True):
                counts[name].append(each)
        for name, each_rank in counts.items():
            yield {
                "strategy": strategy,
                "pass": name,
                "operations": median(each.count.total() for each in each_rank),
                "megabytes": median(each.bytes for each in each_rank) / 1e6,
            }


def _bytes(name: str, args: Any, result: Any) -> int:
    """Read and written, from the shapes of what goes in and comes out."""
    inputs = [x for x in _flat(args) if isinstance(x, Tensor)]
    outputs = [x for x in _flat([result]) if isinstance(x, Tensor)]
    if name in _SOME_ROWS:  # the rows, not the buffer that they are in
        indices = sum(x.nbytes for x in inputs if x.dtype == torch.int64)
        values = [x for x in inputs[1:] if x.dtype != torch.int64] or outputs
        return indices + (3 if name == "index_add_" else 2) * sum(x.nbytes for x in values)
    read = sum(x.nbytes for x in inputs[name in _OVERWRITE :])
    return read + sum(x.nbytes for x in outputs)


def _flat(values: Any) -> Iterator[Any]:
    for each in values:
        if isinstance(each, list | tuple):
            yield from _flat(each)
        else:
            yield each
