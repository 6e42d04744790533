"""``python -m lab soak``: training while planning workers are killed, beside the same run in peace.

``dcp train`` runs twice with the same configuration. In the second run a random planning worker
gets SIGKILL every ``--every`` seconds. The losses of every step must be the same, every death must
have had its one warning, and the wait for plans is reported for both runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from dcp.bench.conditions import conditions

WORKER = "dcp.data.worker"
DEATH = re.compile(r"pid (\d+), exit status -9")  # a batch's warning names all of its deaths
WARM_STEPS = 10  # of the start: workers and kernels begin, nothing is planned ahead yet
SETTINGS = {
    "tokens_per_batch": 6144,
    "max_seqlen": 4096,
    "config_overrides": "num_hidden_layers=2",
    "planning_ranks": "0,1",
    "max_documents": 2000,
    "save_strategy": "no",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=300, help="steps of a run (default: %(default)s)"
    )
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--num-processes", type=int, default=2, help="ranks (2 or more)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the job and of the kills")
    parser.add_argument("--out", type=Path, help="folder for soak.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train twice, compare, print, write; 1 where the runs differ. Returns the exit status."""
    if args.num_processes < 2 or args.steps <= WARM_STEPS or args.every <= 0:
        raise ValueError(
            f"the soak needs 2 ranks, more than {WARM_STEPS} steps and --every above 0, got "
            f"{args.num_processes}, {args.steps} and {args.every}"
        )
    if not Path("/proc/self/stat").exists():
        raise ValueError("the soak finds planning workers in /proc, which this system lacks")
    with tempfile.TemporaryDirectory(prefix="dcp-soak-") as folder:
        peace = train(args, Path(folder) / "peace", every=None)
        disturbed = train(args, Path(folder) / "disturbed", every=args.every)
    pairs = zip(peace.pop("losses"), disturbed.pop("losses"), strict=True)
    result = {
        "conditions": conditions(),
        "steps": args.steps,
        "num_processes": args.num_processes,
        "settings": SETTINGS,
        "undisturbed": peace,
        "disturbed": disturbed,
        "max_loss_difference": max(abs(one - other) for one, other in pairs),
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else as_text(result))
    return int(result["max_loss_difference"] > 0 or bool(disturbed["deaths_without_warning"]))


def train(args: argparse.Namespace, output: Path, *, every: float | None) -> dict[str, Any]:
    """One job's figures; with ``every``, a worker is killed each so many seconds."""
    values = SETTINGS | {"max_steps": args.steps, "seed": args.seed, "output_dir": output}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "dcp.cli", "train", "--disable-tqdm=true", *options]
    command += ["--num-processes", str(args.num_processes)]
    output.mkdir()
    began = time.monotonic()
    with (output / "stderr.log").open("w") as log:
        job = subprocess.Popen(command, stderr=log)
        try:
            killed = disturb(job, every, random.Random(args.seed))
        finally:
            job.kill()
            job.wait()
    shown = "".join(path.read_text() for path in [output / "stderr.log", *output.glob("logs/*")])
    if job.returncode:
        raise ValueError(f"dcp train ended with status {job.returncode}: {shown[-500:]}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    figures = summarise([step for step in map(json.loads, lines) if "loss" in step])
    warned = {int(pid) for pid in DEATH.findall(shown)}
    return figures | {
        "wall_seconds": time.monotonic() - began,
        "kills": len(killed),
        "warnings": len(warned),
        # A death is noticed with the worker's next batch, which the last one's may not see.
        "deaths_without_warning": sorted(set(killed[:-1]) - warned),
    }


def disturb(job: subprocess.Popen, every: float | None, rng: random.Random) -> list[int]:
    """Wait for the job; the workers that were killed meanwhile, in order."""
    killed: list[int] = []
    while True:
        try:
            job.wait(every)
            return killed
        except subprocess.TimeoutExpired:
            if workers := sorted(set(planning_workers(job.pid)) - set(killed)):
                os.kill(victim := rng.choice(workers), signal.SIGKILL)
                killed.append(victim)


def planning_workers(ancestor: int) -> list[int]:
    """Process ids of the planning workers among a process's descendants."""
    return [pid for pid in family(ancestor) if WORKER in _command(pid)]


def family(ancestor: int) -> set[int]:
    """Process ids of a process and its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if after_name[0] != "Z":
            parents[int(stat.parent.name)] = int(after_name[1])
    found, size = {ancestor}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def summarise(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses, and the wait for plans on the first rank once the start is over."""
    warm = steps[WARM_STEPS:]
    waits = [step["plan_wait_seconds"] for step in warm]
    seconds = [step["seconds"] for step in warm]
    shares = [wait / second for wait, second in zip(waits, seconds, strict=True)]
    return {
        "losses": [step["loss"] for step in steps],
        "last_loss": steps[-1]["loss"],
        "median_step_seconds": median(seconds),
        "median_planning_seconds": median(step["planning_seconds"] for step in warm),
        "median_planned_ahead": median(step["planned_ahead"] for step in warm),
        "least_planned_ahead": min(step["planned_ahead"] for step in warm),
        "wait_share": sum(waits) / sum(seconds),
        "median_wait_share": median(shares),
        "longest_wait_seconds": max(waits),
    }


def as_text(result: dict[str, Any]) -> str:
    rows = [
        ("minutes", lambda r: f"{r['wall_seconds'] / 60:.1f}"),
        ("workers killed", lambda r: f"{r['kills']}"),
        ("warnings", lambda r: f"{r['warnings']}"),
        ("median step, s", lambda r: f"{r['median_step_seconds']:.3f}"),
        ("median planning, s", lambda r: f"{r['median_planning_seconds']:.3f}"),
        ("planned ahead, median", lambda r: f"{r['median_planned_ahead']:g}"),
        ("planned ahead, least", lambda r: f"{r['least_planned_ahead']:g}"),
        ("waited for plans", lambda r: f"{r['wait_share']:.3%}"),
        ("of a median step", lambda r: f"{r['median_wait_share']:.3%}"),
        ("longest wait, s", lambda r: f"{r['longest_wait_seconds']:.3f}"),
        ("last loss", lambda r: f"{r['last_loss']:.6f}"),
    ]
    lines = [f"{'':24}{'undisturbed':>14}{'disturbed':>14}"]
    for name, show in rows:
        one, other = show(result["undisturbed"]), show(result["disturbed"])
        lines.append(f"{name:24}{one:>14}{other:>14}")
    lines.append(f"largest difference of a step's loss: {result['max_loss_difference']:g}")
    return "\n".join(lines)
