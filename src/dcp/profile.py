"""``dcp profile``: measure this cluster and write the file that ``Cluster.load`` reads.

The kernels that serve are raced on a causal square; rates come from the fastest, over a range of
block sizes, and ranks of the cluster run it. Latency and bandwidth come from messages between two
ranks of a node and, under torchrun on several nodes, between two nodes. On one node the inter-node
figures keep the preset's values, and the file says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.cost import FORWARD_FLOPS
from dcp.launch.group import choose_device, joined_group
from dcp.launch.ranks import run_ranks
from dcp.masks import AttnMask
from dcp.planner import plan
from dcp.runtime import AttentionExecutor
from dcp.runtime.kernels import KERNELS, get_kernel
from dcp.runtime.kernels.trial import trial
from dcp.runtime.session import Call

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
SMALL_BYTES, LARGE_BYTES = 64, 16 << 20
RACE_TOKENS = 2048  # of the causal square that kernels are raced on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("cluster.json"), help="file to write")
    parser.add_argument("--name", default="measured", help="name of the cluster in the file")
    parser.add_argument("--nodes", type=int, default=1, help="machines the file describes")
    parser.add_argument("--devices-per-node", type=int, default=1, help="devices of each machine")
    parser.add_argument("--heads", type=int, default=8, help="query heads to measure with")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads to measure with")
    parser.add_argument("--head-dim", type=int, default=64, help="head_dim to measure with")
    parser.add_argument("--dtype", default="float32", help="dtype to measure with")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")


def run(args: argparse.Namespace) -> int:
    """Measure and write; under torchrun every rank takes part and rank 0 writes."""
    torch.set_num_threads(args.threads)
    spec = AttentionSpec(
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype=args.dtype,
    )
    cluster = Cluster.preset("laptop", num_nodes=args.nodes, devices_per_node=args.devices_per_node)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    raced = race_kernels(spec, device)
    kernel = min(raced, key=lambda name: raced[name])
    rates = measure_kernel(spec, device, kernel=kernel)
    cluster = replace(
        cluster,
        name=args.name,
        kernel=kernel,
        kernel_rates=rates,
        device_flops=max(rate for _, rate in rates),
        kernel_tile=measure_kernel_tile(spec, device, kernel=kernel),
        backward_ratio=measure_backward_ratio(spec, device, kernel=kernel),
        memory_bandwidth=measure_memory(device),
        pack_bandwidth=measure_pack(device),
        launch_seconds=measure_launch(spec, device, kernel=kernel),
    )
    cluster = replace(cluster, **measure_links())
    if int(os.environ.get("RANK", 0)) == 0:
        cluster.save(args.out)
        for name, seconds in raced.items():
            taken = ", taken" if name == kernel else ""
            print(f"kernel {name:16} {1e3 * seconds:12.2f} ms{taken}")
        for side, rate in rates:
            print(f"attention, {side:5} x {side:<5} {rate / 1e9:12.1f} GFLOP/s")
        print(f"tile at a mask's edge   {cluster.kernel_tile:12} tokens")
        print(f"backward ÷ forward      {cluster.backward_ratio:12.2f}")
        print(f"memory                  {cluster.memory_bandwidth / 1e9:12.1f} GB/s")
        if cluster.pack_bandwidth:
            print(f"packing                 {cluster.pack_bandwidth / 1e9:12.1f} GB/s")
        print(f"launch                  {cluster.launch_seconds * 1e6:12.1f} us")
        for where in ("intra", "inter"):
            latency = getattr(cluster, f"{where}_node_latency")
            bandwidth = getattr(cluster, f"{where}_node_bandwidth")
            print(f"{where}-node link  {latency * 1e6:9.1f} us {bandwidth / 1e9:12.2f} GB/s")
        print(f"written to {args.out}")
    return 0


def race_kernels(
    spec: AttentionSpec, device: torch.device, *, side: int = RACE_TOKENS
) -> dict[str, float]:
    """Seconds of a causal square, forward and backward, by each kernel that serves training.

    Kernels whose results are wrong on the device are left out, and named.
    """
    dtype = getattr(torch, spec.dtype)
    options = Call().options(spec, needs_grad=True)
    seconds = {}
    for name in KERNELS:
        try:
            wrong = trial(get_kernel(name, device, dtype, options), device, dtype, options)
        except ValueError:  # it says what it cannot serve
            continue
        if wrong is not None:
            print(f"kernel {name} is left out: {wrong}", file=sys.stderr)
            continue
        attend = _attention(AttnMask.causal(side), spec, device, None, needs_grad=True, kernel=name)
        grad = torch.ones_like(attend())
        seconds[name] = _seconds(lambda: attend().backward(grad), device)  # noqa: B023
    return seconds


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
        seconds = _seconds(attend, device)
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
        _seconds(_attention(mask, spec, device, group, kernel=kernel), device)
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
    both = _seconds(lambda: forward().backward(grad), device)
    alone = _seconds(forward, device)
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


def measure_memory(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def measure_pack(device: torch.device) -> float:
    """Bytes per second at which parts of a message are copied into one."""
    parts = [torch.zeros(1 << 20, dtype=torch.uint8, device=device) for _ in range(4)]
    return (4 << 20) / _seconds(lambda: torch.cat(parts), device)


def measure_launch(
    spec: AttentionSpec,
    device: torch.device,
    *,
    group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
) -> float:
    """Seconds of the smallest pass there is, of one token."""
    return _seconds(_attention(AttnMask.full(1), spec, device, group, kernel=kernel), device)


def _seconds(work: Callable[[], object], device: torch.device, *, least: float = 0.2) -> float:
    """Median seconds of one call, over at least ``least`` seconds and five calls."""
    work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        started = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - started)
    return median(times)


# --------------------------------------------------------------------------- links


def measure_links() -> dict[str, Any]:
    """Latency (s) and bandwidth (bytes/s) between ranks of a node and between nodes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return measure_group({"device": "auto"})
    return run_ranks("dcp.profile:measure_group", {"device": "cpu"}, num_processes=2)[0]


def measure_group(job: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure_links` on one of the ranks, which all take part; the first one's count."""
    with joined_group(choose_device(job["device"])):
        rank, size = dist.get_rank(), dist.get_world_size()
        local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        if _on_gpu():  # NCCL connects a group at its first operation, which needs all ranks
            dist.all_reduce(torch.zeros(1, device="cuda"))
        found = measure_link(rank, 1, "intra") if local_size > 1 else {}
        if size > local_size:
            found |= measure_link(rank, local_size, "inter")
        return found


def measure_link(rank: int, peer: int, where: str, *, large: int = LARGE_BYTES) -> dict[str, float]:
    """Latency and bandwidth between rank 0 and ``peer``, both sending at once as plans do.

    Every other rank looks on. ``large``: bytes of the message whose time gives the bandwidth.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else "cpu"
    trip = {}
    for size in (SMALL_BYTES, large):
        message, answer = torch.zeros((2, size), dtype=torch.uint8, device=device)
        times = []
        for _ in range(12):
            started = perf_counter()
            if rank in (0, peer):
                other = peer if rank == 0 else 0
                operations = ((dist.irecv, answer), (dist.isend, message))
                works = dist.batch_isend_irecv(
                    [dist.P2POp(kind, tensor, other) for kind, tensor in operations]
                )
                for work in works:
                    work.wait()
                if _on_gpu():
                    torch.cuda.synchronize()
            times.append(perf_counter() - started)
        trip[size] = median(times[2:])
    latency = trip[SMALL_BYTES]
    bandwidth = (large - SMALL_BYTES) / max(trip[large] - latency, 1e-9)
    found = {f"{where}_node_latency": latency, f"{where}_node_bandwidth": bandwidth}
    return found | ({"device_network_bandwidth": bandwidth} if where == "inter" else {})


def _on_gpu() -> bool:
    return dist.get_backend() == "nccl"
