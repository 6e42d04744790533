"""``python -m lab train``: the same training job by several strategies, on real slow links.

``dcp train`` runs as gloo ranks inside a testbed of shaped links (:mod:`lab.testbed`), every
strategy on the same documents from the same seed, planned for the cluster that the ranks measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from dcp.batch import AttentionSpec
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.integrations.transformers import attention_of
from dcp.jobs import PLANNED, Options, arguments_of, read_options
from dcp.train.model import config_of, tokenizer_of
from dcp.train.record import METRICS
from lab.fleet import measured_cluster, run_plans
from lab.results import merge
from lab.testbed import Testbed, open_testbed

STRATEGIES = ("auto", "zigzag", "a2a_p2p", "groups")
LOSS_TARGET = 1e-4  # largest difference from the first strategy's loss, at any step
WARM_UP = 2  # steps that are not timed, unless more are asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=2, help="nodes (default: %(default)s)")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--mbits", type=float, default=200, help="link speed, Mbit/s (default: %(default)s)"
    )
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, metavar="NAME")
    parser.add_argument("--config", type=Path, help="YAML or JSON of dcp train (default: its own)")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of each run")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, metavar="STEPS",
                        help="not timed: rates are learnt then (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, help="runs of each strategy, in turn")
    parser.add_argument("--out", type=Path, help="folder of train.json, to add this run to")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train, print, write. Returns the exit status."""
    if not 0 <= args.warm_up < args.steps:
        raise ValueError(f"--warm-up must be 0 or more and less than --steps {args.steps}, "
                         f"got {args.warm_up}")  # fmt: skip
    options = read_job(args.config) | {"max_steps": args.steps}
    spec = spec_of(options)
    with (
        tempfile.TemporaryDirectory(prefix="dcp-train-") as name,
        open_testbed(args.nodes, bandwidth=args.mbits * 1e6 / 8) as bed,
    ):
        folder = Path(name)
        like = Cluster.preset("laptop", num_nodes=args.nodes, devices_per_node=args.ranks_per_node)
        found = run_plans(bed, [], spec, ranks_per_node=args.ranks_per_node, rates=True)
        cluster = measured_cluster(found, like, name=f"testbed, {args.mbits:g} Mbit/s")
        cluster.save(folder / "cluster.json")
        options["cluster"] = str(folder / "cluster.json")
        runs: dict[str, list[list[dict[str, Any]]]] = {each: [] for each in args.strategies}
        for turn in range(args.rounds):
            for strategy in args.strategies[:: -1 if turn % 2 else 1]:
                output = str(folder / f"{strategy}-{turn}")
                job = options | {"strategy": strategy, "output_dir": output}
                runs[strategy].append(train(bed, job, ranks_per_node=args.ranks_per_node))
    name = f"{args.nodes} x {args.ranks_per_node}, {args.mbits:g} Mbit/s"
    result = {
        "conditions": conditions(),
        "rounds": args.rounds,
        "config": {k: v for k, v in options.items() if k not in ("cluster", "output_dir")},
        "cluster": asdict(cluster),
        "strategies": {
            strategy: figures(each, warm_up=args.warm_up) for strategy, each in runs.items()
        },
        "warm_up": args.warm_up,
    }
    result["loss_difference"] = loss_difference([each[0] for each in runs.values()])
    if args.out:
        merge(args.out / "train.json", name, result)
    print(json.dumps({name: result}) if args.json else as_text(name, result))
    return 0


def read_job(config: Path | None) -> Options:
    """The options of a job: the file's, and what a run here asks for."""
    given, _ = read_options([] if config is None else [str(config)])
    if given["job"] != PLANNED:
        raise ValueError(f"{config}: a job of planned attention is wanted, got {given['job']!r}")
    ours = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return {"seed": 0, **given, **ours}


def spec_of(options: Options) -> AttentionSpec:
    """Heads and dtype of the attention of a job's model."""
    model, data, batches, run = arguments_of(options)
    longest = data.max_seqlen or batches.tokens_per_batch
    config = config_of(model, tokenizer=tokenizer_of(model), max_positions=longest)
    return attention_of(config, dtype="bfloat16" if run.bf16 else "float32").spec


def train(bed: Testbed, options: Options, *, ranks_per_node: int) -> list[dict[str, Any]]:
    """One job on the testbed's ranks; the metrics of its steps."""
    bed.run("dcp.jobs:train", options, ranks_per_node=ranks_per_node)
    lines = (Path(options["output_dir"]) / METRICS).read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def figures(runs: Sequence[Sequence[dict[str, Any]]], *, warm_up: int = WARM_UP) -> dict[str, Any]:
    """One strategy's speed over the timed steps of all runs, and its losses."""
    timed = [step for steps in runs for step in steps[warm_up:]]
    speeds = sorted(step["tokens_per_second"] for step in timed)
    first = runs[0]
    return {
        "tokens_per_second": median(speeds),
        "spread": [speeds[0], speeds[-1]],
        "by_round": [median(s["tokens_per_second"] for s in steps[warm_up:]) for steps in runs],
        "plan_wait_seconds": median(step["plan_wait_seconds"] for step in timed),
        "step_seconds": median(step["seconds"] for step in timed),
        "inter_node_bytes": median(step["inter_node_bytes"] for step in timed),
        "chosen": sorted({step["strategy"] for step in first}),
        "losses": [step["loss"] for step in first],
    }


def loss_difference(runs: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Largest difference of any run's loss from the first run's, at any step."""
    return max(
        abs(step["loss"] - other["loss"])
        for run in runs
        for step, other in zip(runs[0], run, strict=True)
    )


def as_text(name: str, result: dict[str, Any]) -> str:
    """The table that is printed."""
    lines = [
        f"{name}, {result['config']['max_steps']} steps, {result['rounds']} rounds",
        f"{'strategy':10} {'tokens/s':>9} {'lowest':>8} {'highest':>8} {'step s':>7} "
        f"{'MB':>6} {'loss':>9}  plans",
    ]
    for strategy, each in result["strategies"].items():
        low, high = each["spread"]
        lines.append(
            f"{strategy:10} {each['tokens_per_second']:9,.0f} {low:8,.0f} {high:8,.0f} "
            f"{each['step_seconds']:7.2f} {each['inter_node_bytes'] / 1e6:6.1f} "
            f"{each['losses'][-1]:9.5f}  {', '.join(each['chosen'])}"
        )
    difference = result["loss_difference"]
    met = "met" if difference <= LOSS_TARGET else "NOT MET"
    lines.append(f"losses differ by at most {difference:.1e} (target {LOSS_TARGET:.0e}, {met})")
    return "\n".join(lines)
