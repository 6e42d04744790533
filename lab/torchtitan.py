"""``python -m lab torchtitan``: its context parallelism beside planned attention, simulated.

torchtitan 0.3 (``distributed/context_parallel``) shards a packed batch over its ranks, gathers all
keys and values before any work, and computes the queries that a rank holds with FlexAttention. Its
load balancers say which those are: ``headtail``, in the library the strategy ``allgather``, and
``ptrr``. Both are torch's; torchtitan need not be installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, build_blocks
from dcp.cluster import Cluster
from dcp.placement.allgather import gathered
from dcp.placement.grids import cut_at
from dcp.planner import plan
from dcp.plans import Plan
from lab.planner import MASKS, SPEC, load, make_batch

PTRR = "torchtitan CP (ptrr)"
HEADTAIL = "torchtitan CP (headtail)"
_BLOCK = 128  # of a BlockMask


def plan_ptrr(batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> Plan:
    """Blocks of 128 queries dealt round and back by the number of key blocks that they see, by
    torch's ``_PTRRLoadBalancer``; all keys gathered. The end is filled up to equal shares."""
    blocks, chunk, num_chunks = _chunks(batch, spec, cluster.num_ranks)
    owner = _deal(_visible(blocks, chunk, num_chunks), cluster.num_ranks)[chunk]
    notes = {"padding_tokens": num_chunks * _BLOCK - batch.num_tokens}
    placement = gathered(blocks, owner, cluster, notes=notes)
    return Plan.from_placement(placement, cluster, strategy=PTRR)


def _chunks(
    batch: SequenceBatch, spec: AttentionSpec, num_ranks: int
) -> tuple[BlockTable, np.ndarray, int]:
    """Blocks, the chunk of 128 tokens that each is in, and the number of chunks."""
    num_chunks = -(-batch.num_tokens // (_BLOCK * num_ranks)) * num_ranks
    edges = np.arange(0, batch.num_tokens, _BLOCK)
    blocks = build_blocks(batch, spec, block_lengths=cut_at(batch, edges))
    return blocks, blocks.offset // _BLOCK, num_chunks


def _visible(blocks: BlockTable, chunk: np.ndarray, num_chunks: int) -> np.ndarray:
    """Chunks of keys that each chunk of queries sees, of the batch's only mask: int64."""
    (tiles,) = blocks.masks.values()
    pairs = np.unique(chunk[tiles.q] * num_chunks + chunk[tiles.k])
    return np.bincount(pairs // num_chunks, minlength=num_chunks)


def _deal(work: np.ndarray, num_ranks: int) -> np.ndarray:
    """Rank of each chunk."""
    import torch
    from torch.distributed.tensor.experimental._attention import _PTRRLoadBalancer

    dealt = _PTRRLoadBalancer.ptrr_scheduling(torch.from_numpy(work), num_ranks)
    owner = np.empty(len(work), dtype=np.int64)
    for rank, mine in enumerate(dealt.numpy()):
        owner[mine] = rank
    return owner


# --------------------------------------------------------------------------- the experiment


def _by_name(name: str) -> Callable[..., Plan]:
    # Attention alone is compared, so attention alone decides (model_width=0).
    return lambda *case: plan(*case, strategy=name, model_width=0)


PLANNERS: dict[str, Callable[..., Plan]] = {
    "auto": _by_name("auto"),
    HEADTAIL: _by_name("allgather"),
    PTRR: plan_ptrr,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--devices-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, simulate, print. Returns the exit status."""
    cluster = Cluster(num_nodes=args.nodes, devices_per_node=args.devices_per_node)
    rows = [
        compare(batch["name"], make_batch(batch["seqlens"], mask), mask, cluster)
        for batch in load("planner_batches.json")
        for mask in MASKS
    ]
    print(json.dumps(rows) if args.json else as_text(rows))
    return 0


def compare(name: str, batch: SequenceBatch, mask: str, cluster: Cluster) -> dict[str, Any]:
    """Simulated seconds of attention, forward and backward, and figures of each planner's plan.

    Blocks of 128 queries would be small items to the library's kernels, not to FlexAttention: so
    torchtitan's plans are simulated without memory traffic and partial tiles, ours with.
    """
    row: dict[str, Any] = {"batch": name, "mask": mask}
    free = replace(cluster, memory_bandwidth=1e18, kernel_tile=1)
    for planner, make in PLANNERS.items():
        made = make(batch, SPEC, cluster if planner == "auto" else free)
        timeline = made.simulate()
        row[planner] = {
            "seconds": timeline.forward_seconds + timeline.backward_seconds,
            "compute_balance": made.stats.compute_balance,
            "total_bytes": made.stats.inter_node_bytes + made.stats.intra_node_bytes,
        }
    return row


def as_text(rows: list[dict[str, Any]]) -> str:
    """A line for each case: ours in milliseconds, the others as multiples of it."""
    lines = [f"{'batch':17} {'mask':16} {'auto ms':>8}" + "".join(f"{p:>26}" for p in PLANNERS)]
    for row in rows:
        ours = row["auto"]["seconds"]
        shown = "".join(f"{row[p]['seconds'] / ours:25.2f}x" for p in PLANNERS)
        lines.append(f"{row['batch']:17} {row['mask']:16} {ours * 1e3:8.2f}{shown}")
    for mask in MASKS:
        of = [row for row in rows if row["mask"] == mask]
        shown = "".join(
            f"{median(row[p]['seconds'] / row['auto']['seconds'] for row in of):25.2f}x"
            for p in PLANNERS
        )
        lines.append(f"{'median':17} {mask:16} {'':8}{shown}")
    return "\n".join(lines)
