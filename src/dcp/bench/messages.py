"""Ranks that share one device: the rows of ``dcp bench kernels`` that show messages at work where
there is no second card. Over NCCL one rank alone, which may have a device only once; over gloo two
processes, by way of the host.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.rivals import host_medians
from dcp.cluster import Cluster
from dcp.launch.group import joined_group
from dcp.launch.ranks import run_ranks
from dcp.masks import AttnMask
from dcp.planner import plan
from dcp.runtime import AttentionExecutor
from dcp.runtime.kernels.device_clock import Works
from dcp.runtime.reference import dense_attention, relative_error

SEQLENS = (1500, 300, 24)
TIMEOUT = 180.0  # seconds: ranks that wait for each other for longer have failed


def spec_on(device: str) -> AttentionSpec:
    """Heads of the case: in half precision where the device is a GPU."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    return AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, dtype=dtype)


def gloo_error(device: str) -> tuple[float, str]:
    """Largest relative error of two processes' outputs and gradients over that of dense attention
    in the same dtype; both processes compute on the same device."""
    job = {"device": device, "nccl": False, "repeat": 5}
    found = run_ranks("dcp.bench.messages:run_rank", job, num_processes=2, timeout_seconds=TIMEOUT)
    worst = max(each["error"] for each in found)
    usual = max(each["dense_error"] for each in found)
    took = 1e3 * max(each["seconds"] for each in found)
    note = f"relative errors {worst:.1e} against {usual:.1e}; {took:.1f} ms, both passes"
    return worst / usual, note


def nccl_ratio(repeat: int) -> tuple[float, str]:
    """Time of both passes over an NCCL group of one rank, over that without a group."""
    job = {"device": "cuda", "nccl": True, "repeat": repeat}
    [found] = run_ranks(
        "dcp.bench.messages:run_rank", job, num_processes=1, timeout_seconds=TIMEOUT
    )
    return found["ratio"], f"relative error {found['error']:.1e}, by the host's clock"


def run_rank(job: dict[str, Any]) -> dict[str, float]:
    """One rank: its errors on its own tokens, and its times."""
    device = torch.device(job["device"], 0) if job["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    with joined_group(device if job["nccl"] else torch.device("cpu")):
        spec, rank = spec_on(job["device"]), dist.get_rank()
        masks = [AttnMask.streaming(n, sink=16, window=100) for n in SEQLENS]
        made = plan(
            SequenceBatch(SEQLENS, masks),
            spec,
            Cluster(devices_per_node=dist.get_world_size()),
            strategy="zigzag",
        )
        seen = torch.block_diag(*(torch.from_numpy(m.to_dense()) for m in masks)).bool()
        *inputs, grad = _inputs(spec, device)
        exact = _by_the_book([x.double() for x in (*inputs, grad)], seen.to(device))
        dense = _by_the_book([*inputs, grad], seen.to(device))
        own = partial(made.shard, rank)
        q, kv = (x.requires_grad_() for x in (own(inputs[0]), own(torch.stack(inputs[1:], 1))))
        grad = own(grad)

        def both_passes(executor: AttentionExecutor) -> list[Tensor]:
            out = executor.attention(q, kv)
            grad_q, grad_kv = torch.autograd.grad(out, (q, kv), grad)
            return [out.detach(), grad_q, *grad_kv.unbind(1)]

        executor = AttentionExecutor(dist.group.WORLD)
        executor.prepare(made)
        ours = both_passes(executor)
        found = {
            "error": max(relative_error(a, own(b)) for a, b in zip(ours, exact, strict=True)),
            "dense_error": max(relative_error(a, b) for a, b in zip(dense, exact, strict=True)),
            "seconds": _median_seconds(partial(both_passes, executor), job["repeat"]),
        }
        if dist.get_world_size() == 1:
            alone = AttentionExecutor()
            alone.prepare(made)
            works: Works = {
                "group": partial(both_passes, executor),
                "none": partial(both_passes, alone),
            }
            seconds = host_medians(works, job["repeat"])
            found["ratio"] = seconds["group"] / seconds["none"]
        return found


def _inputs(spec: AttentionSpec, device: torch.device) -> list[Tensor]:
    """q, k, v and the output's gradient of the whole batch, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads, spec.num_heads)
    dtype = getattr(torch, spec.dtype)
    return [
        torch.randn(sum(SEQLENS), n, spec.head_dim, generator=generator).to(device, dtype)
        for n in heads
    ]


def _by_the_book(tensors: list[Tensor], seen: Tensor) -> list[Tensor]:
    """out, dq, dk and dv."""
    q, k, v = inputs = [x.clone().requires_grad_() for x in tensors[:3]]
    out, _ = dense_attention(q, k, v, seen)
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]


def _median_seconds(work: partial[list[Tensor]], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        dist.barrier()
        began = perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return median(times)
