"""One rank of an emulated cluster: real executor, real messages, sleeping kernels.

Time is stretched: the cluster here is a dilated one (:func:`lab.emulated_network.dilated`). Kernels
sleep the seconds that are predicted on it, links are as slow, a message waits out its latency.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.cost import linear_seconds
from dcp.launch.group import joined_group
from dcp.layer import linear_share
from dcp.program import MaskProgram, RankPlan
from dcp.rates import program_seconds
from dcp.runtime import AttentionExecutor
from dcp.runtime.communicator import GroupCommunicator, Messages
from dcp.runtime.kernels import Kernel, Options, QSide

MALLOC = ((-1, 1 << 30), (-4, 0), (-8, 1))  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX of glibc
KEPT = 128 << 20  # bytes that are touched beforehand
CHECK_SECONDS = 4  # that a message takes which measures a link between nodes


class SleepingKernel(Kernel):
    """Sleeps for as long as the cluster's devices would compute, and computes nothing.

    Args:
        slowdown: of this rank's device, 1 being the cluster's.
    """

    name = "sleeping"

    def __init__(self, spec: AttentionSpec, cluster: Cluster, *, slowdown: float = 1.0) -> None:
        self.spec, self.cluster, self.slowdown = spec, cluster, slowdown

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        return None if device.type == "cpu" else "it sleeps on the CPU"

    def prepare(
        self, program: MaskProgram, device: torch.device, *, widest: int, dtype: torch.dtype
    ) -> dict[int, Any]:
        """Seconds of (forward, backward) of each division, of one head group that has all heads."""
        passes = [
            program_seconds(program, self.spec, self.cluster, backward=backward).tolist()
            for backward in (False, True)
        ]
        return dict(enumerate(zip(*passes, strict=True)))

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        return torch.zeros(out.shape[:-1])

    def forward(
        self, work: Any, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:
        self._sleep(work[0], heads=q.shape[1])

    def backward(
        self, work: Any, q_side: QSide, kv: Tensor, grad_q: Tensor, grad_kv: Tensor,
        options: Options,
    ) -> None:  # fmt: skip
        self._sleep(work[1], heads=q_side[0].shape[1])

    def _sleep(self, seconds: float, *, heads: int) -> None:
        launch = self.cluster.launch_seconds
        compute = (seconds - launch) * heads / self.spec.num_heads  # the rest of the heads: others'
        sleep((launch + compute) * self.slowdown)


class SlowCommunicator(GroupCommunicator):
    """Posts every message as late as the cluster's latency wants it.

    Gloo moves a message once both its ends are posted: it leaves ``latency`` after the later of the
    two has come to it, as in the simulator.
    """

    def __init__(self, group: dist.ProcessGroup, cluster: Cluster) -> None:
        super().__init__(group)
        node = cluster.node_of_rank
        self.is_far = (node != node[self.rank]).tolist()
        self.latency = {True: cluster.inter_node_latency, False: cluster.intra_node_latency}
        self.threads = {far: ThreadPoolExecutor(1) for far in (False, True)}

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]:
        self._settle(wait=True)
        now = perf_counter()
        posted = []
        for far, thread in self.threads.items():  # each posts in the order of the program
            operations = [
                self._operation(kind, messages[peer], peer)
                for kind, messages in ((dist.irecv, receives), (dist.isend, sends))
                for peer in messages
                if self.is_far[peer] == far
            ]
            if operations:
                posted.append(thread.submit(_post, operations, now + self.latency[far]))
        return self._arrive(posted, sends, receives)

    def _arrive(
        self, posted: list[Future[list[dist.Work]]], sends: Messages, receives: Messages
    ) -> Iterator[None]:
        works = [work for future in posted for work in future.result()]
        return self._complete(works, sends, receives, receives)


def _post(operations: list[dist.P2POp], due: float) -> list[dist.Work]:
    sleep(max(due - perf_counter(), 0.0))
    return dist.batch_isend_irecv(operations)


# --------------------------------------------------------------------------- what is timed


@dataclass(frozen=True)
class Emulated:
    """What a rank needs to run plans."""

    executor: AttentionExecutor
    spec: AttentionSpec
    cluster: Cluster
    model_width: int | None = None
    slowness: float = 1.0


def run_plans(job: dict[str, Any]) -> dict[str, Any]:
    """Every plan of the job in turn, round after round, turns of inference forward only; seconds
    are the machine's own.

    Returns ``links`` (:func:`measure_links`), and by plan and round: ``passes``, seconds of
    (forward, backward) from a barrier on; ``layers``, of as many layers in a row as the job says;
    ``busy``, the share of this machine's cores that was used. Where links are not what they should
    be, no plan is run.
    """
    torch.set_num_threads(1)
    keep_memory()
    spec, cluster = AttentionSpec(**job["spec"]), cluster_of(job["cluster"])
    with joined_group(torch.device("cpu")) as group:
        executor = AttentionExecutor(group, kernel=SleepingKernel(spec, cluster))
        executor.communicator = SlowCommunicator(group, cluster)
        here = Emulated(executor, spec, cluster)
        links = measure_links(cluster)
        if not _links_are_right(links, cluster, most=job["link_error"]):
            return {"links": links, "passes": []}
        folder, rank = Path(job["folder"]), executor.rank
        plans = [
            RankPlan.from_bytes((folder / f"{plan}-{rank}.plan").read_bytes())
            for plan in range(job["num_plans"])
        ]
        found: dict[str, Any] = {"links": links}
        found |= {name: [[] for _ in plans] for name in ("passes", "layers", "busy")}
        executor.prepare(plans[job["shortest"]])
        backward = job["backward"]
        time_passes(here, backward=backward)  # to warm up: what is imported, pages, connections
        for _ in range(job["rounds"]):
            for index, plan in enumerate(plans):
                executor.prepare(plan)
                dist.barrier()  # what ranks do to prepare is not the pass's
                began = cpu_ticks()
                found["passes"][index].append(time_passes(here, backward=backward))
                if job["layers"]:
                    found["layers"][index].append(time_layers(here, job["layers"]))
                found["busy"][index].append(busy_since(began))
        dist.barrier()
        return found


def keep_memory() -> None:
    """Let freed memory be used again: fresh pages cost several times what a message does."""
    libc = ctypes.CDLL(None)
    for parameter, value in MALLOC:
        libc.mallopt(parameter, value)
    torch.ones(KEPT, dtype=torch.uint8)


def cluster_of(fields: dict[str, Any]) -> Cluster:
    """From JSON."""
    sizes = fields["devices_per_node"]
    return Cluster(
        **fields | {"devices_per_node": tuple(sizes) if isinstance(sizes, list) else sizes}
    )


def time_passes(here: Emulated, *, backward: bool = True) -> tuple[float, ...]:
    """Seconds of one forward and one backward pass of attention, each after a barrier."""
    q, kv = _tensors(here)
    dist.barrier()
    began = perf_counter()
    with torch.set_grad_enabled(backward):
        out = here.executor.attention(q, kv)
    forward = perf_counter() - began
    if not backward:
        return (forward,)
    dist.barrier()
    began = perf_counter()
    out.backward(torch.zeros_like(out))
    return forward, perf_counter() - began


def time_layers(here: Emulated, num_layers: int) -> float:
    """Seconds of whole layers, forward and then backward: nothing but messages makes ranks wait."""
    q, kv = _tensors(here)
    linear = linear_seconds(len(q), here.spec, here.cluster, model_width=here.model_width)
    linear *= here.slowness
    dist.barrier()
    began = perf_counter()
    rows = q
    for _ in range(num_layers):
        rows = _Linear.apply(rows, linear)
        rows = here.executor.attention(rows, kv)
    rows.backward(torch.zeros_like(rows))
    return perf_counter() - began


class _Linear(torch.autograd.Function):
    """The linear parts of a layer: a third of their time forward, two thirds backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        sleep(seconds * linear_share(backward=False))
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        sleep(ctx.seconds * linear_share(backward=True))
        return grad, None


def _tensors(here: Emulated) -> tuple[Tensor, Tensor]:
    plan, spec = here.executor.plan, here.spec
    assert plan is not None
    dtype = getattr(torch, spec.dtype)
    shapes = (
        (plan.num_local_tokens, spec.num_heads, spec.head_dim),
        (plan.num_local_keys, *spec.kv_shape()),
    )
    q, kv = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, kv


# --------------------------------------------------------------------------- links and cores


def link_ratios(found: Sequence[dict[str, float]], cluster: Cluster) -> dict[str, float]:
    """What the links gave (:func:`measure_links`), in the median of the ranks, over what they
    should have given."""
    size = float(cluster.node_sizes[0])
    card, network = cluster.device_network_bandwidth, cluster.inter_node_bandwidth
    should = {
        "intra_node_bandwidth": cluster.intra_node_bandwidth,
        "inter_node_bandwidth": min(network, card * size),
        "device_network_bandwidth": min(card, network),
    }
    seen = {name: [links[name] for links in found if name in links] for name in should}
    return {name: median(each) / should[name] for name, each in seen.items() if each}


def _links_are_right(links: dict[str, float], cluster: Cluster, *, most: float) -> bool:
    """Whether no link is further than ``most`` from what it should be; collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, links)
    return all(abs(ratio - 1) <= most for ratio in link_ratios(found, cluster).values())


def measure_links(cluster: Cluster) -> dict[str, float]:
    """Bytes per second that this rank's links give.

    ``intra_node_bandwidth``: all ranks of all nodes send to the next of theirs; ``inter_node``: all
    send to a rank of the next node, a node's sum; ``device_network``: one rank of each node does.
    """
    rank, node = dist.get_rank(), cluster.node_of_rank
    sizes, starts = cluster.node_sizes, np.cumsum(cluster.node_sizes) - cluster.node_sizes
    mine, place = int(node[rank]), int(rank - starts[node[rank]])
    found = {}
    if sizes.min() > 1:
        to, source = (int(starts[mine] + (place + way) % sizes[mine]) for way in (1, -1))
        size = int(0.5 * cluster.intra_node_bandwidth)
        found["intra_node_bandwidth"] = _exchange_rate(to, source, size)
    if cluster.num_nodes > 1 and len(set(sizes.tolist())) == 1:
        near, far = ((mine + way) % cluster.num_nodes for way in (1, -1))
        to, source = int(starts[near] + place), int(starts[far] + place)
        share = min(cluster.device_network_bandwidth, cluster.inter_node_bandwidth / sizes[mine])
        rate = _exchange_rate(to, source, int(CHECK_SECONDS * share))
        found["inter_node_bandwidth"] = rate * float(sizes[mine])
        alone = min(cluster.device_network_bandwidth, cluster.inter_node_bandwidth)
        size = int(CHECK_SECONDS * alone)
        rate = _exchange_rate(to, source, size, takes_part=place == 0)
        if place == 0:
            found["device_network_bandwidth"] = rate
    return found


def _exchange_rate(to: int, source: int, num_bytes: int, *, takes_part: bool = True) -> float:
    """Bytes per second of a large message, after a small one that opens the link. Collective."""
    for size in (1 << 10, num_bytes):
        sent, received = torch.ones((2, max(size, 1)), dtype=torch.uint8)
        dist.barrier()
        began = perf_counter()
        if not takes_part:
            continue
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, received, source), dist.P2POp(dist.isend, sent, to)]
        )
        for work in works:
            work.wait()
    return num_bytes / (perf_counter() - began)


def cpu_ticks() -> tuple[float, float]:
    """Ticks that this machine's cores have worked, and that they have had, since its start.

    What runs at a lower priority than usual gives way, and so does not count.
    """
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, idle, waiting, *interrupts = (int(word) for word in words)
    worked, had = user + system + sum(interrupts), sum((user, nice, system, idle, waiting))
    return float(worked), float(had + sum(interrupts))


def busy_since(began: tuple[float, float]) -> float:
    """The share of the cores' time since then in which they worked."""
    worked, had = (now - then for now, then in zip(cpu_ticks(), began, strict=True))
    return worked / max(had, 1.0)
