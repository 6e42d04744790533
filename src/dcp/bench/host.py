"""The rows of ``dcp bench kernels`` that need no GPU, and the plans that they are of."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from time import perf_counter

import numpy as np
import torch

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench import rivals
from dcp.bench.kernels_gpu import SPEC, STRATEGY
from dcp.bench.rows import Row
from dcp.cluster import Cluster
from dcp.planner import plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, LocalWorld
from dcp.runtime.kernels.triton import place_tables
from dcp.runtime.kernels.triton_shapes import SHAPES
from dcp.runtime.prepared import PreparedPlan

CPU_SPEC = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=64, dtype="float32")
PLAN_TOKENS, PLAN_CLUSTER = 131072, Cluster(num_nodes=4, devices_per_node=8)


def ready_row(plans: list[RankPlan]) -> Row:
    """Host time of all that a rank makes of its plan before the first launch."""
    times = []
    for rank_plan in plans * 3:
        began = perf_counter()
        prepared = PreparedPlan(rank_plan)
        for backward in (False, True):
            prepared.instructions(None, torch.device("cpu"), backward=backward)
        place_tables(rank_plan.mask_program(), torch.device("cpu"), SHAPES[90, 128, 2])
        times.append(perf_counter() - began)
    case = f"{PLAN_TOKENS} tokens, 32 ranks"
    note = "milliseconds on the host, without the copy; off the critical path with ready()"
    return Row("ready() of a rank", case, "<= 1", "", 1e3 * median(times), note)


def cpu_row(tokens: int, block_size: int, world: int, repeat: int) -> Row:
    """Time of the block-wise path (all ranks in turn) over one fused call, forward and backward."""
    row = Row(
        "CPU: block-wise / one-shot time",
        f"{tokens} tokens, block {block_size}, {world} rank{'s' * (world > 1)}",
        "<= 1.15" if world == 1 else "",
    )
    cluster = Cluster(devices_per_node=world)
    made = plan(SequenceBatch([tokens]), CPU_SPEC, cluster, strategy="magi", block_size=block_size)
    heads, kv_heads = CPU_SPEC.num_heads, CPU_SPEC.num_kv_heads
    q = torch.randn(tokens, heads, CPU_SPEC.head_dim, requires_grad=True)
    kv = torch.randn(tokens, 2, kv_heads, CPU_SPEC.head_dim, requires_grad=True)
    grad = torch.randn(q.shape)
    executor, local = AttentionExecutor(kernel="torch_cpu"), LocalWorld(made, kernel="torch_cpu")
    if world == 1:
        executor.prepare(made)

    def ours() -> None:
        out = executor.attention(q, kv) if world == 1 else local.attention(q, *kv.unbind(1))
        torch.autograd.grad(out, (q, kv), grad)

    def one_shot() -> None:
        query, key, value = (x.transpose(0, 1)[None] for x in (q, *kv.unbind(1)))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (q, kv), grad.transpose(0, 1)[None])

    seconds = rivals.host_medians({"ours": ours, "one_shot": one_shot}, repeat)
    note = f"{seconds['ours']:.3f} s against {seconds['one_shot']:.3f} s, forward and backward"
    return replace(row, value=seconds["ours"] / seconds["one_shot"], note=note)


# --------------------------------------------------------------------------- inputs


def long_tailed(tokens: int, *, seed: int) -> list[int]:
    """Document lengths, log-normal, that fill ``tokens``."""
    draws = np.random.default_rng(seed).lognormal(7.5, 1.2, size=4096).astype(int) + 1
    ends = np.minimum(np.cumsum(draws), tokens)
    return [int(n) for n in np.diff(np.append(0, ends)) if n]


def rank_plans() -> list[RankPlan]:
    batch = SequenceBatch(long_tailed(PLAN_TOKENS, seed=0))
    made = plan(batch, SPEC, PLAN_CLUSTER, strategy=STRATEGY)
    return [made.rank_plan(rank) for rank in range(PLAN_CLUSTER.num_ranks)]
