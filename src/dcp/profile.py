"""``dcp profile``: measure this cluster and write the file that ``Cluster.load`` reads.

Every kernel that serves is measured by block size, mask kind, dtype and head_dim: the file carries
that table, and ranks run the fastest. The rates of what is not in it come from the fastest kernel
of the first dtype and head_dim. Latency and bandwidth come from messages between two
ranks of a node and, under torchrun on several nodes, between two nodes. On one node the inter-node
figures keep the preset's values, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from dcp.batch import AttentionSpec
from dcp.bench import rates
from dcp.cluster import Cluster
from dcp.kernel_table import fastest_kernel
from dcp.launch.group import choose_device, joined_group
from dcp.launch.progress import working
from dcp.launch.ranks import run_ranks

SMALL_BYTES, LARGE_BYTES = 64, 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("cluster.json"), help="file to write")
    parser.add_argument("--name", default="measured", help="name of the cluster in the file")
    parser.add_argument("--nodes", type=int, default=1, help="machines the file describes")
    parser.add_argument("--devices-per-node", type=int, default=1, help="devices of each machine")
    parser.add_argument("--heads", type=int, default=8, help="query heads to measure with")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads to measure with")
    for name, kind, default in (("head-dim", int, 64), ("dtype", str, "float32")):
        parser.add_argument(
            f"--{name}", type=kind, nargs="+", default=[default], help=f"{name}s to measure with"
        )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--json", action="store_true", help="print what the file holds")


def run(args: argparse.Namespace) -> int:
    """Measure and write; under torchrun every rank takes part and rank 0 writes."""
    torch.set_num_threads(args.threads)
    specs = [
        AttentionSpec(
            num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=head_dim, dtype=dtype
        )
        for dtype in args.dtype
        for head_dim in args.head_dim
    ]
    spec = specs[0]
    cluster = Cluster.preset("laptop", num_nodes=args.nodes, devices_per_node=args.devices_per_node)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with working("measuring kernels, about a minute for a dtype and head_dim"):
        table = rates.measure_table(specs, device)
        kernel = fastest_kernel(table, spec.dtype, spec.head_dim) or "auto"
        by_side = rates.measure_kernel(spec, device, kernel=kernel)
        tile = rates.measure_kernel_tile(spec, device, kernel=kernel)
        backward_ratio = rates.measure_backward_ratio(spec, device, kernel=kernel)
    with working("measuring memory and links"):
        cluster = replace(
            cluster,
            name=args.name,
            kernel_table=table,
            kernel_rates=by_side,
            device_flops=max(rate for _, rate in by_side),
            kernel_tile=tile,
            backward_ratio=backward_ratio,
            memory_bandwidth=measure_memory(device),
            pack_bandwidth=measure_pack(device),
            launch_seconds=rates.measure_launch(spec, device, kernel=kernel),
        )
        cluster = replace(cluster, **measure_links())
    if int(os.environ.get("RANK", 0)) == 0:
        cluster.save(args.out)
        if args.json:
            print(json.dumps(json.loads(args.out.read_text())))
        else:
            print("\n".join(as_text(cluster, specs)))
        print(f"written to {args.out}", file=sys.stderr if args.json else sys.stdout)
    return 0


def as_text(cluster: Cluster, specs: Sequence[AttentionSpec]) -> Iterator[str]:
    """The figures in lines of at most 80 columns."""
    yield from table_text(cluster, specs)
    for side, rate in cluster.kernel_rates:
        yield f"attention, {side:5} x {side:<5} {rate / 1e9:12.1f} GFLOP/s"
    yield f"tile at a mask's edge   {cluster.kernel_tile:12} tokens"
    yield f"backward ÷ forward      {cluster.backward_ratio:12.2f}"
    yield f"memory                  {cluster.memory_bandwidth / 1e9:12.1f} GB/s"
    if cluster.pack_bandwidth:
        yield f"packing                 {cluster.pack_bandwidth / 1e9:12.1f} GB/s"
    yield f"launch                  {cluster.launch_seconds * 1e6:12.1f} us"
    for where in ("intra", "inter"):
        latency = getattr(cluster, f"{where}_node_latency")
        bandwidth = getattr(cluster, f"{where}_node_bandwidth")
        yield f"{where}-node link  {latency * 1e6:9.1f} us {bandwidth / 1e9:12.2f} GB/s"


def table_text(cluster: Cluster, specs: Sequence[AttentionSpec]) -> Iterator[str]:
    """The table in lines of at most 80 columns: GFLOP/s by mask, and which kernel is taken."""
    for spec in specs:
        taken = cluster.kernel_for(spec)
        yield f"{spec.dtype}, head_dim {spec.head_dim}: ranks run {taken}"
        for line in cluster.kernel_table:
            if (line.dtype, line.head_dim) == (spec.dtype, spec.head_dim):
                for way, each in (("fwd", line.forward), ("bwd", line.backward)):
                    found = " ".join(f"{rate / 1e9:7.0f}" for rate in each)
                    yield f"  {line.kernel:9} {line.mask:6} {way} {found or 'none'}"
        sides = {side for line in cluster.kernel_table for side in line.sides}
        yield f"  GFLOP/s; side {' ' * 6}" + " ".join(f"{side:7}" for side in sorted(sides))


def measure_memory(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / rates.seconds_of(lambda: target.copy_(source), device)


def measure_pack(device: torch.device) -> float:
    """Bytes per second at which parts of a message are copied into one."""
    parts = [torch.zeros(1 << 20, dtype=torch.uint8, device=device) for _ in range(4)]
    return (4 << 20) / rates.seconds_of(lambda: torch.cat(parts), device)


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
