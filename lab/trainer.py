"""``python -m lab trainer``: DCPTrainer beside plain Trainer with packed rows, on real slow links.

Both train the same small Llama from the same seed on the same documents, the same ones in every
optimiser step, by DistributedDataParallel over gloo ranks in a testbed (:mod:`lab.testbed`). Plain
Trainer gives each rank whole documents as one row without padding (:mod:`lab.trainer_rank`).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.integrations.transformers import attention_of
from lab.fleet import measured_cluster, run_plans
from lab.results import merge
from lab.testbed import Testbed, open_testbed
from lab.trainer_rank import OURS, PLAIN, config_of

TARGET = 0.95  # of plain Trainer's tokens per second, where documents are short
WARM_UP = 2  # steps that are not timed
NODES = 2  # of one rank each
SHORT = (100, 1000)  # tokens of a short document
CASES = ("short", "long-tailed", "too long")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mbits", type=float, nargs="+", default=[200, math.inf], help="links; inf: not shaped"
    )
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="NAME")
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each system, in turn")
    parser.add_argument("--out", type=Path, help="folder of trainer.json, to add these runs to")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Train, print, write. Returns the exit status."""
    if args.steps // 2 <= WARM_UP:  # of "too long" documents half as many, which take long
        raise ValueError(f"--steps must be {2 * WARM_UP + 2} or more, got {args.steps}")
    results = {}
    for mbits in args.mbits:
        speed = f"{mbits:g} Mbit/s" if math.isfinite(mbits) else "not shaped"
        name = f"{NODES} x 1, {speed}"
        with open_testbed(NODES, bandwidth=mbits * 1e6 / 8) as bed:
            results[name] = {"conditions": conditions()} | measure(bed, args)
        if args.out:
            merge(args.out / "trainer.json", name, results[name])
        if not args.json:
            print(as_text(name, results[name]), flush=True)
    if args.json:
        print(json.dumps(results))
    return 0


def measure(bed: Testbed, args: argparse.Namespace) -> dict[str, Any]:
    """Every case by every system on one testbed, planned for the cluster that it measures."""
    cases = {
        each: make_case(each, args.steps // (2 if each == "too long" else 1), tokens=args.tokens)
        for each in args.cases
    }
    with tempfile.TemporaryDirectory(prefix="dcp-trainer-") as folder:
        spec = attention_of(config_of(args.tokens), dtype="float32").spec
        like = Cluster.preset("laptop", num_nodes=NODES, devices_per_node=1)
        found = run_plans(bed, [], spec, ranks_per_node=1, rates=True)
        cluster = f"{folder}/cluster.json"
        measured_cluster(found, like, name="testbed").save(cluster)
        rows = {}
        for case, steps in cases.items():
            job = {"steps": steps, "cluster": cluster, "output": f"{folder}/run"}
            runs: dict[str, list[list[dict[str, Any]]]] = {each: [] for each in (OURS, *PLAIN)}
            for turn in range(args.rounds):
                for system in list(runs)[:: -1 if turn % 2 else 1]:
                    runs[system].append(bed.run("lab.trainer_rank:run", job | {"system": system}))
            rows[case] = compare(steps, runs)
    return {"rounds": args.rounds, "target": TARGET, "tokens_of_a_rank": args.tokens, "cases": rows}


def make_case(name: str, steps: int, *, tokens: int) -> list[list[int]]:
    """Lengths of each step's documents: short ones, behind a long one where the case has it.

    Args:
        tokens: a rank's budget; a step has twice as many, and of "too long" documents twice that
            again, with as little beside them as a second rank of plain Trainer needs.
    """
    rng = np.random.default_rng(0)
    made = []
    for _ in range(steps):
        step, total = [], NODES * tokens
        if name == "long-tailed":
            step = [int(rng.integers(tokens, 3 * tokens // 2))]
        elif name == "too long":
            step, total = [4 * tokens], 4 * tokens + SHORT[0]
        while (left := total - sum(step)) > 0:
            step.append(min(left, int(rng.integers(*SHORT, endpoint=True))))
        made.append(step)
    return made


def compare(
    steps: Sequence[Sequence[int]], runs: dict[str, list[list[dict[str, Any]]]]
) -> dict[str, Any]:
    """A case's figures.

    Args:
        runs: by system, what each rank of each round found.
    """
    systems = {name: figures(steps, each) for name, each in runs.items()}
    ours = systems[OURS]
    for each in systems.values():
        each["ratio"] = ours["tokens_per_second"] / each["tokens_per_second"]
        pairs = zip(ours["losses"], each["losses"], strict=True)
        each["loss_difference"] = max(abs(one - other) for one, other in pairs)
    return {
        "tokens_of_a_step": sum(steps[0]),
        "longest_document": max(map(max, steps)),
        "systems": systems,
    }


def figures(
    steps: Sequence[Sequence[int]], runs: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, Any]:
    """One system's speed over the timed steps of all runs, losses, and memory of the worst rank."""
    tokens = np.array([sum(step) for step in steps])  # the same in each
    speeds = [tokens / np.max([rank["seconds"] for rank in ranks], axis=0) for ranks in runs]
    timed = np.array(speeds)[:, WARM_UP:]
    cpu = np.array([np.sum([rank["cpu_seconds"] for rank in ranks], axis=0) for ranks in runs])
    worst = max((rank for ranks in runs for rank in ranks), key=grown)
    return {
        "tokens_per_second": float(np.median(timed)),
        "spread": [float(timed.min()), float(timed.max())],
        "by_round": np.median(timed, axis=1).tolist(),
        "cpu_seconds": float(np.median(cpu[:, WARM_UP:])),  # of a step, all ranks
        "longest_row": max(max(rank["rows"]) for ranks in runs for rank in ranks),
        "memory_before_bytes": worst["memory_before_bytes"],
        "memory_peak_bytes": worst["memory_peak_bytes"],
        "memory_grown_bytes": grown(worst),
        "grown_by_rank": [[grown(rank) for rank in ranks] for ranks in runs],
        "plan_wait_seconds": median(w for r in runs for w in r[0]["plan_wait_seconds"][WARM_UP:]),
        "attention_bytes": median(b for r in runs for b in r[0]["attention_bytes"][WARM_UP:]),
        "losses": runs[0][0]["losses"],
    }


def grown(rank: dict[str, Any]) -> int:
    """Bytes of memory that training needed beyond what the rank had before."""
    return int(rank["memory_peak_bytes"] - rank["memory_before_bytes"])


def as_text(name: str, result: dict[str, Any]) -> str:
    """The table that is printed."""
    lines = [
        f"{name}, {result['rounds']} rounds",
        f"{'case':12} {'system':21} {'tokens/s':>8} {'lowest':>7} {'highest':>7} {'CPU s':>6} "
        f"{'row':>6} {'MB grown':>8} {'from':>5} {'to':>5} {'wait ms':>7} "
        f"{'ratio':>5} {'loss':>8}  by round",
    ]
    for case, row in result["cases"].items():
        for system, each in row["systems"].items():
            low, high = each["spread"]
            grew, before, peak = (
                each[f"memory_{which}_bytes"] / 1e6 for which in ("grown", "before", "peak")
            )
            rounds = ", ".join(f"{speed:,.0f}" for speed in each["by_round"])
            lines.append(
                f"{case:12} {system:21} {each['tokens_per_second']:8,.0f} {low:7,.0f} {high:7,.0f} "
                f"{each['cpu_seconds']:6.2f} {each['longest_row']:6} {grew:8,.0f} "
                f"{before:5,.0f} {peak:5,.0f} {each['plan_wait_seconds'] * 1e3:7.1f} "
                f"{each['ratio']:5.2f} {each['loss_difference']:8.1e}  {rounds}"
            )
    if "short" in result["cases"]:
        for system in PLAIN:
            ratio = result["cases"]["short"]["systems"][system]["ratio"]
            met = "met" if ratio >= TARGET else "NOT MET"
            lines.append(f"short documents, {ratio:.2f} of {system}: target {TARGET} {met}")
    return "\n".join(lines)
