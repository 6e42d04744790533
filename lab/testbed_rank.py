"""One rank of a testbed: measures rates, runs plans, returns what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp import profile
from dcp.batch import AttentionSpec
from dcp.bench import rates
from dcp.launch.group import joined_group
from dcp.plans import Plan
from dcp.runtime import AttentionExecutor, LocalWorld
from lab.testbed import sent_and_received

LINK_BYTES = 2 << 20  # of a message that measures a slow link: about as long as a plan's


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What the job asks for (:func:`lab.fleet.run_plans`)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with joined_group(torch.device("cpu")):
        plans = [Plan.load(path) for path in job["plans"]]
        spec = AttentionSpec(**job["spec"])

        def rates() -> list[dict[str, Any]]:
            return [measure_rates(spec, job["local_size"])] if job["rates"] else []

        before = rates()
        found = time_plans(plans, spec, repeat=job["repeat"])
        if job["local"]:
            found["local"] = [time_local(plan, job["repeat"]) for plan in plans]
        found["rates"] = before + (rates() if plans else [])
        dist.barrier()
        return found


def time_plans(plans: Sequence[Plan], spec: AttentionSpec, *, repeat: int) -> dict[str, Any]:
    """Rounds over all plans, so that slow drifts hit all alike; the first round warms up.

    Returns by plan: ``runs``, seconds of (forward, backward) in each round, and ``wire``, bytes
    that this rank's node sent and received in both passes: the least of all rounds, because TCP
    sends again what a busy machine was late to acknowledge.
    """
    executor = AttentionExecutor()
    like = torch.empty(0, dtype=getattr(torch, spec.dtype))
    prepared = [executor.ready(plan, like) for plan in plans]
    runs: list[list[tuple[float, float]]] = [[] for _ in plans]
    wire: list[list[tuple[int, ...]]] = [[] for _ in plans]
    for _ in range(repeat + 1):
        for times, counts, ready in zip(runs, wire, prepared, strict=True):
            executor.prepare(ready)
            before = sent_and_received()
            times.append(time_ranks(executor))
            dist.barrier()  # all that was sent has arrived
            after = sent_and_received()
            counts.append(tuple(b - a for a, b in zip(before, after, strict=True)))
    return {"runs": runs, "wire": [np.min(counts, axis=0).tolist() for counts in wire]}


def measure_rates(spec: AttentionSpec, local_size: int) -> dict[str, Any]:
    """Fields of a :class:`Cluster`, measured on all ranks at once, as they will compute."""
    device, rank = torch.device("cpu"), dist.get_rank()
    lone = [dist.new_group([each]) for each in range(dist.get_world_size())][rank]
    dist.barrier()
    by_side = rates.measure_kernel(spec, device, group=lone)
    found = {
        "kernel_rates": by_side,
        "device_flops": max(rate for _, rate in by_side),
        "kernel_tile": rates.measure_kernel_tile(spec, device, group=lone),
        "backward_ratio": rates.measure_backward_ratio(spec, device, group=lone),
        "memory_bandwidth": profile.measure_memory(device),
        "pack_bandwidth": profile.measure_pack(device),
        "launch_seconds": rates.measure_launch(spec, device, group=lone),
    }
    dist.barrier()
    if dist.get_world_size() > local_size:
        found |= profile.measure_link(rank, local_size, "inter", large=LINK_BYTES)
    if local_size > 1:
        found |= profile.measure_link(rank, 1, "intra", large=LINK_BYTES)
    dist.barrier()
    return found


def time_ranks(executor: AttentionExecutor) -> tuple[float, float]:
    """Seconds of this rank's forward and backward pass over the process group."""
    mine = executor.plan
    assert mine is not None
    q, kv = _tensors(mine.spec, mine.num_local_tokens)
    forward, out = _timed(lambda: executor.attention(q, kv))
    backward, _ = _timed(lambda: out.backward(torch.ones_like(out)))
    return forward, backward


def time_local(plan: Plan, repeat: int) -> tuple[float, float]:
    """Median seconds of all ranks' work in this process: kernels without a network."""
    world = LocalWorld(plan)
    times = []
    for _ in range(repeat + 1):
        q, kv = _tensors(plan.spec, plan.num_tokens)
        k, v = kv.unbind(1)
        forward, out = _timed(lambda: world.attention(q, k, v))  # noqa: B023
        backward, _ = _timed(lambda: out.backward(torch.ones_like(out)))  # noqa: B023
        times.append((forward, backward))
    forwards, backwards = zip(*times[1:], strict=True)  # the first one builds tables
    return median(forwards), median(backwards)


def _tensors(spec: AttentionSpec, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = getattr(torch, spec.dtype)
    q = torch.randn(tokens, spec.num_heads, spec.head_dim, dtype=dtype, requires_grad=True)
    kv = torch.randn(tokens, 2, spec.num_kv_heads, spec.head_dim, dtype=dtype, requires_grad=True)
    return q, kv


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    dist.barrier()
    started = perf_counter()
    result = work()
    return perf_counter() - started, result
