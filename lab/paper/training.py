"""Figures 14 and 15: a training iteration of the 8 B model on 8 nodes of 8 A100, simulated.

Tensor parallel over 4 devices, so 16 ranks; a batch has as many tokens as its longest document may
have. Ours is searched over block size and tolerance on a few batches; the best of each cell is
kept in a file and used for the figure, as ``strategy="auto"`` with those settings. The baseline is
the static hierarchical scheme that Megatron-LM ran with.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dcp.cluster import Cluster
from dcp.planner import plan
from lab.paper.campaign import Task
from lab.paper.end_to_end import GPT_8B, predict_iteration, sliced_cluster
from lab.paper.rows import Row, mean_by
from lab.paper.workbench import MASKS, Workbench
from lab.planner import make_batch
from lab.published import PUBLISHED

TENSOR_PARALLEL = 4
TOKENS = (16384, 32768, 65536, 131072)
BATCHES, GRID_BATCHES = 16, 2
STATIC = "a2a_p2p"
TOLERANCES = (0.03, 0.2)
BLOCK_SIZES = {  # 0: the planner's own choice; the others as published
    16384: (0, 512, 1024),
    32768: (0, 1024),
    65536: (0, 1024),
    131072: (0, 2048, 4096),
}
CONFIGS = "best_configs.json"
Configs = dict[str, dict[str, float]]  # by "DATA TOKENS MASK": block_size, tolerance


def rows(bench: Workbench) -> list[Row]:
    """Both systems in every cell, ours with the best configuration of the grid.

    That is read from ``bench.configs`` or from the data folder, and searched for where there is
    none.
    """
    path = bench.configs or bench.data / CONFIGS
    best = load_configs(path) if path.exists() else search(bench, path)
    tasks: list[Task] = []
    for data, tokens, mask in cells():
        ours = best[cell_name(data, tokens, mask)]
        for batch in _batches(bench, data, tokens, mask, BATCHES):
            tasks.append(_task(batch, "static", STATIC, {"block_size": 0, "tolerance": 0.03}))
            tasks.append(_task(batch, "dcp", "auto", ours))
    return bench.run("end_to_end", tasks, measure)


def search(bench: Workbench, path: Path) -> Configs:
    """Try the grid in every cell and keep each cell's fastest configuration in ``path``."""
    tasks = [
        _task(batch, "dcp", "auto", {"block_size": size, "tolerance": tolerance})
        for data, tokens, mask in cells()
        for batch in _batches(bench, data, tokens, mask, GRID_BATCHES)
        for size in BLOCK_SIZES[tokens]
        for tolerance in TOLERANCES
    ]
    found = bench.run("end_to_end_grid", tasks, measure)
    keys = ("data", "tokens", "mask", "block_size", "tolerance")
    best: dict[str, Row] = {}
    for row in mean_by(found, keys, ("seconds",)):
        name = cell_name(row["data"], row["tokens"], row["mask"])
        if name not in best or row["seconds"] < best[name]["seconds"]:
            best[name] = row
    configs = {
        name: {"block_size": row["block_size"], "tolerance": row["tolerance"]}
        for name, row in best.items()
    }
    path.write_text(json.dumps(configs, indent=1) + "\n")
    return configs


def load_configs(path: Path) -> Configs:
    """Best configurations from a file. Raises ``ValueError`` where a cell is missing."""
    configs = json.loads(path.read_text())
    if missing := [name for name in (cell_name(*c) for c in cells()) if name not in configs]:
        raise ValueError(f"{path} has no configuration for {missing[0]!r}; delete it to search")
    return configs


def cells() -> list[tuple[str, int, str]]:
    """Data set, tokens and mask of every bar."""
    return [(data, tokens, mask) for data in PUBLISHED for tokens in TOKENS for mask in MASKS]


def cell_name(data: str, tokens: int, mask: str) -> str:
    return f"{data} {tokens} {mask}"


def _batches(
    bench: Workbench, data: str, tokens: int, mask: str, count: int
) -> list[tuple[Row, list[int]]]:
    named = {"lengths": bench.label(data), "data": data, "tokens": tokens, "mask": mask}
    batches = bench.batches(data, tokens=tokens, count=bench.count(count))
    return [(named | {"batch": index}, seqlens) for index, seqlens in enumerate(batches)]


def _task(
    batch: tuple[Row, list[int]], system: str, strategy: str, config: dict[str, float]
) -> Task:
    return batch[0] | {"system": system, "strategy": strategy, **config}, batch[1]


def measure(case: Row, seqlens: list[int]) -> Row:
    """Simulated seconds of one iteration, by parts."""
    cluster = Cluster.preset("a100", num_nodes=8, devices_per_node=8)
    made = plan(
        make_batch(seqlens, case["mask"]),
        GPT_8B.spec(TENSOR_PARALLEL),
        sliced_cluster(cluster, TENSOR_PARALLEL),
        strategy=case["strategy"],
        block_size=case["block_size"] or "auto",
        tolerance=case["tolerance"],
    )
    iteration = predict_iteration(made, GPT_8B, cluster, TENSOR_PARALLEL)
    return {
        "chosen": made.stats.strategy,
        "seconds": iteration.seconds,
        **asdict(iteration),
        "compute_balance": made.stats.compute_balance,
        "token_balance": made.stats.token_balance,
        "planning_seconds": made.stats.planning_seconds,
    }
