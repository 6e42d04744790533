"""Rates of this machine's attention kernels, as ``dcp profile`` writes them into a cluster file.

A block's rate is measured in a launch of many like it, as divisions have them, and what the launch
itself takes is left out: the file has it apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.alone import Alone
from dcp.cluster import Cluster
from dcp.kernel_table import BACKWARD_FLOPS, BLOCK_MASKS, FORWARD_FLOPS, KernelRates, KernelTable
from dcp.masks import AttnMask
from dcp.planner import plan
from dcp.runtime import AttentionExecutor
from dcp.runtime.kernels import KERNELS, Kernel, get_kernel
from dcp.runtime.kernels.device_clock import device_medians
from dcp.runtime.kernels.trial import trial
from dcp.runtime.session import Call

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
LAUNCH_TOKENS = {"cuda": 16384, "cpu": 512}  # of the launch in which blocks are measured, at least
LONG = 0.25  # seconds of a pass after which larger blocks are not tried: rates have levelled out


# --------------------------------------------------------------------------- the table


def measure_table(
    specs: Iterable[AttentionSpec], device: torch.device, *, sides: Sequence[int] = ()
) -> KernelTable:
    """Every kernel that serves, by dtype and head_dim of ``specs``, mask kind and block size.

    Kernels whose results are wrong on the device are left out, and named.
    """
    return tuple(
        measure_line(kernel, spec, device, mask, trains=trains, sides=sides)
        for spec in specs
        for kernel, trains in serving_kernels(spec, device)
        for mask in BLOCK_MASKS
    )


def serving_kernels(spec: AttentionSpec, device: torch.device) -> Iterator[tuple[Kernel, bool]]:
    """Kernels that are right on the device, each with whether it has a backward pass."""
    dtype = getattr(torch, spec.dtype)
    for name in KERNELS:
        for trains in (True, False):
            options = Call().options(spec, needs_grad=trains)
            try:
                kernel = get_kernel(name, device, dtype, options)
            except ValueError:  # it says what it cannot serve
                continue
            try:
                wrong = trial(kernel, device, dtype, options)
            except Exception as error:  # a device may refuse what runs elsewhere
                wrong = f"it fails on a small case: {type(error).__name__}: {error}"
            if wrong is None:
                yield kernel, trains
            else:
                print(f"kernel {name} is left out: {wrong}", file=sys.stderr)
            break


def measure_line(
    kernel: Kernel,
    spec: AttentionSpec,
    device: torch.device,
    mask: str,
    *,
    trains: bool = True,
    sides: Sequence[int] = (),
) -> KernelRates:
    """One kernel on blocks of one mask kind, of growing size."""
    idle = [0.0, 0.0]
    if device.type == "cpu":  # on a GPU, times are those on the device
        idle = _pass_seconds(kernel, spec, device, AttnMask.full(1), 1, trains)
    measured: list[int] = []
    rates: tuple[list[float], list[float]] = [], []
    for side in sides or BLOCK_SIZES:
        block = block_mask(mask, side)
        count = -(-LAUNCH_TOKENS.get(device.type, 512) // side)
        seconds = _pass_seconds(kernel, spec, device, block, count, trains)
        pairs = block.area * count * spec.num_heads * spec.head_dim
        measured.append(side)
        for way, taken in enumerate(seconds):
            flops = (FORWARD_FLOPS, BACKWARD_FLOPS)[way] * pairs
            rates[way].append(flops / max(taken - idle[way], taken / 10))
        if max(seconds) > LONG:
            break
    return KernelRates(
        kernel=kernel.name,
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        mask=mask,
        sides=tuple(measured),
        forward=tuple(rates[0]),
        backward=tuple(rates[1]),
    )


def block_mask(mask: str, side: int) -> AttnMask:
    """A square block of the table's kind."""
    if mask == "banded":
        return AttnMask.sliding_window(side, max(side // 2, 1))
    return AttnMask.causal(side) if mask == "causal" else AttnMask.full(side)


def _pass_seconds(
    kernel: Kernel,
    spec: AttentionSpec,
    device: torch.device,
    mask: AttnMask,
    count: int,
    trains: bool,
) -> list[float]:
    """Seconds of the forward pass over ``count`` blocks in one launch, and of the backward one."""
    batch = SequenceBatch([mask.q_len] * count, [mask] * count)
    one = Cluster(devices_per_node=1)
    made = plan(batch, spec, one, strategy="data_parallel", block_size=mask.q_len)
    alone = Alone(made.rank_plan(0), kernel, device, getattr(torch, spec.dtype), trains=trains)
    found = alone.forward()
    works: list[Callable[[], object]] = [alone.forward]
    works += [partial(alone.backward, *(x.clone() for x in found))] if trains else []
    if device.type == "cuda":
        return [device_medians({"ours": work}, 5)["ours"] for work in works]
    return [seconds_of(work, device, least=0.05, calls=3) for work in works]


# --------------------------------------------------------------------------- one kernel's rates


def measure_kernel(
    spec: AttentionSpec,
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
) -> tuple[tuple[int, float], ...]:
    """(side of a square full block, forward FLOP/s) for every block size.

    ``group``: this rank alone, where a process group of more has been initialised.
    """
    launch = measure_launch(spec, device, group=group, kernel=kernel)
    pairs = FORWARD_FLOPS * spec.num_heads * spec.head_dim
    rates = []
    for side in BLOCK_SIZES:
        attend = _attention(AttnMask.full(side), spec, device, group, kernel=kernel)
        seconds = seconds_of(attend, device)
        rates.append((side, pairs * side**2 / max(seconds - launch, seconds / 10)))
    return tuple(rates)


def measure_kernel_tile(
    spec: AttentionSpec,
    device: torch.device,
    *,
    side: int = 2048,
    group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
) -> int:
    """Side of the tiles computed whole, from what a causal block costs beyond its pairs."""
    full, causal = (
        seconds_of(_attention(mask, spec, device, group, kernel=kernel), device)
        for mask in (AttnMask.full(side), AttnMask.causal(side))
    )
    beyond = causal / full - (side + 1) / (2 * side)  # half a tile for each tile of the diagonal
    return min(max(round(2 * beyond * side), 1), side)


def measure_backward_ratio(
    spec: AttentionSpec,
    device: torch.device,
    *,
    side: int = 1024,
    group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
) -> float:
    """Time of a block's backward pass over that of its forward pass."""
    square = AttnMask.full(side)
    forward = _attention(square, spec, device, group, needs_grad=True, kernel=kernel)
    grad = torch.ones_like(forward())
    both = seconds_of(lambda: forward().backward(grad), device)
    alone = seconds_of(forward, device)
    return max(both - alone, 0.0) / alone


def _attention(
    mask: AttnMask,
    spec: AttentionSpec,
    device: torch.device,
    group: dist.ProcessGroup | None,
    *,
    needs_grad: bool = False,
    kernel: str = "auto",
) -> Callable[[], torch.Tensor]:
    """Attention of one square block by one of the library's kernels."""
    side = mask.q_len
    dtype = getattr(torch, spec.dtype)
    executor = AttentionExecutor(group, kernel=kernel)
    batch = SequenceBatch([side], [mask])
    executor.prepare(plan(batch, spec, Cluster(devices_per_node=1), block_size=side))
    shapes = (side, spec.num_heads, spec.head_dim), (side, 2, spec.num_kv_heads, spec.head_dim)
    q, kv = (
        torch.randn(shape, dtype=dtype, device=device, requires_grad=needs_grad) for shape in shapes
    )
    return lambda: executor.attention(q, kv)


def measure_launch(
    spec: AttentionSpec,
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
) -> float:
    """Seconds of the smallest pass there is, of one token."""
    return seconds_of(_attention(AttnMask.full(1), spec, device, group, kernel=kernel), device)


def seconds_of(
    work: Callable[[], object], device: torch.device, *, least: float = 0.2, calls: int = 5
) -> float:
    """Median seconds of one call, over at least ``least`` seconds and ``calls`` calls."""
    work()
    times: list[float] = []
    while len(times) < calls or sum(times) < least:
        started = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - started)
    return median(times)
