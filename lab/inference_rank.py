"""One rank of ``python -m lab inference``: times turns over a cache, and generation."""

from __future__ import annotations

import json
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.inference.attention import CachedAttention, new_tokens
from dcp.inference.cache import KVCache
from dcp.inference.engine import InferenceEngine
from dcp.inference.model import open_model
from dcp.inference.turn import plan_turn
from dcp.launch.group import joined_group
from dcp.plans import Plan
from lab.testbed_rank import measure_rates


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What the job asks for: rates of the machine and turns, or generation."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with joined_group(torch.device("cpu")) as group:
        found = time_turns(job, group.get_group_store()) if "turns" in job else time_generation(job)
        dist.barrier()
        return found


def time_turns(job: dict[str, Any], store: dist.Store) -> dict[str, Any]:
    """Median seconds of one layer's attention of every turn with every strategy.

    Each round times all of them once, so that slow drifts hit all alike; a time is that of the
    slowest rank.
    """
    spec, size = AttentionSpec(**job["spec"]), dist.get_world_size()
    mine = measure_rates(spec, job["local_size"])
    if dist.get_rank() == 0:  # all ranks plan by the first one's rates
        store.set("rates", json.dumps(mine))
    shape = {"num_nodes": size // job["local_size"], "devices_per_node": job["local_size"]}
    fields = json.loads(store.get("rates")) | shape | {"name": "measured"}
    cluster = Cluster(**fields)

    cases: list[tuple[Plan, CachedAttention, Tensor, Tensor, list[float]]] = []
    for new, cached in job["turns"]:
        held = np.array([[cached // size + (rank < cached % size) for rank in range(size)]])
        for strategy in job["strategies"]:
            plan = plan_turn([new], held, spec, cluster, strategy=strategy)
            attention = cached_before(plan_cache(spec, held, new, job["page_size"]), held)
            attention.begin(plan, ["sequence"])
            tokens = int(new_tokens(plan)[0, dist.get_rank()])
            q = torch.randn(tokens, spec.num_heads, spec.head_dim)
            kv = torch.randn(tokens, 2, spec.num_kv_heads, spec.head_dim)
            cases.append((plan, attention, q, kv, []))
    for _ in range(job["repeat"] + 1):
        for _, attention, q, kv, times in cases:
            dist.barrier()
            started = perf_counter()
            attention.attention(0, q, kv)
            times.append(slowest(perf_counter() - started))
    rows = [
        {
            "chosen": plan.stats.strategy,
            "bytes": plan.stats.inter_node_bytes + plan.stats.intra_node_bytes,
            "predicted_seconds": plan.simulate().forward_seconds,
            "seconds": median(times[1:]),  # the first one builds tables
            "all_seconds": times[1:],
        }
        for plan, _, _, _, times in cases
    ]
    return {"cluster": fields, "rows": rows}


def plan_cache(spec: AttentionSpec, held: np.ndarray, new: int, page_size: int) -> KVCache:
    """A cache of one layer with room for one sequence."""
    num_pages = int(held.max() + new) // page_size + 2
    size, rank = dist.get_world_size(), dist.get_rank()
    return KVCache(
        spec, num_layers=1, num_pages=num_pages, page_size=page_size, rank=rank, num_ranks=size
    )


def cached_before(cache: KVCache, held: np.ndarray) -> CachedAttention:
    """The cache after earlier turns, its keys and values drawn at random."""
    owner = np.repeat(np.arange(held.shape[1]), held[0])
    [rows] = cache.extend(["sequence"], [owner])
    cache.pools[0][torch.from_numpy(rows)] = torch.randn(len(rows), *cache.pools[0].shape[1:])
    return CachedAttention([cache], group=dist.group.WORLD)


def slowest(seconds: float) -> float:
    """The largest of all ranks' times."""
    time = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(time, op=dist.ReduceOp.MAX)
    return float(time)


def time_generation(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first token and per further one, by prompt length."""
    model = open_model(None, **job["model"])
    rows = []
    for length in job["prompts"]:
        engine = InferenceEngine(model, group=dist.group.WORLD, strategy="pass_kv")
        prompt = np.random.default_rng(0).integers(0, 256, length).tolist()
        for name in ("warm", "timed"):
            engine.generate({name: prompt}, max_new_tokens=job["max_new_tokens"])
        first, *rest = (slowest(seconds) for seconds in engine.step_seconds)
        row = {"prompt_tokens": length, "first_token_seconds": first}
        rows.append(row | {"token_seconds": median(rest)})
    return {"rows": rows}
