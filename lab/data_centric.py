"""``python -m lab data_centric``: data-centric parallelism beside its alternatives.

``simulate`` plays epochs of a large video model on 8 to 32 H100, from an analytic profile, and
holds the speedups against the published ones; ``video`` and ``text`` train small models on local
ranks. Results are kept part by part in one file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.data.batching import TokenBudgetBatches
from dcp.datacentric.buckets import DISTRIBUTIONS, Bucket, draw_buckets, video_buckets
from dcp.datacentric.choosers import Chooser, make_chooser
from dcp.datacentric.config import PRESETS, DataCentricArguments
from dcp.datacentric.iteration import RankGroup, epoch_imbalance
from dcp.datacentric.profile import Profile
from dcp.datacentric.schedule import epoch_iterations
from dcp.jobs import PLANNED, Options, arguments_of, launch
from dcp.planner import plan
from dcp.train.record import METRICS
from lab.baselines import BASELINES, bucket_sizes, launch_baseline, make_baseline
from lab.published import draw_lengths
from lab.video_cost import DEPTH, KINDS, TextCost, VideoCost

# speedups over bucket parallel on 32 H100, by distribution (the original's figures 5 to 7)
PUBLISHED = {
    "short": {"intra": 1.55, "inter": 2.12, "inter+PAC": 2.48},
    "balanced": {"intra": 1.23, "inter": 1.68, "inter+PAC": 1.78},
    "long": {"intra": 1.07, "inter": 1.27, "inter+PAC": 1.28},
}
NUM_RANKS = (8, 16, 32)
MEMORY_BYTES = 0.65 * 80 * 2**30  # what the original's configurations leave a GPU of 80 GiB
FIXED_DEGREE, LOCAL_DEGREE = 4, 2  # of the alternatives: what the longest videos need
TEXT_SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128)
ORDER = (*BASELINES, *PRESETS)
TEXT_BATCHES, TEXT_TOKENS = 8, 131072
MEASURED: Options = {  # of every job that is measured
    "max_batch_size": 4,
    "calculate_imbalance": True,
    "seed": 0,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        choices=("simulate", "video", "text"),
        default="simulate",
        help="what to run (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=3000, help="of a simulated epoch")
    parser.add_argument(
        "--num-processes", type=int, default=4, help="local ranks that are measured"
    )
    parser.add_argument("--out", type=Path, help="folder for data_centric.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Run one part, print it, and add it to the file. Returns the exit status."""
    parts = {
        "simulate": lambda: {
            "video": [simulate_video(w, d, args.samples) for w in NUM_RANKS for d in DISTRIBUTIONS],
            "text": [simulate_text(num_ranks) for num_ranks in NUM_RANKS],
        },
        "video": lambda: measure_video(args.num_processes),
        "text": lambda: measure_text(args.num_processes),
    }
    found = {"conditions": conditions(), **parts[args.part]()}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "data_centric.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {args.part: found}, indent=1) + "\n")
    print(json.dumps(found) if args.json else as_text(args.part, found))
    return 0


# --------------------------------------------------------------------------- simulated


def preset_keys(preset: str, *, degree: int, steps: int = 5, least: int = 2) -> dict[str, Any]:
    """The options of a preset: the degree; most and least accumulation where they have a use."""
    if preset in BASELINES:
        return {"preset": "", "sp_size": degree}
    keys: dict[str, Any] = {"preset": preset}
    if "auto_grad_accumulation" in PRESETS[preset]:
        keys |= {"max_grad_accumulation_steps": steps, "min_grad_accumulation_steps": least}
    return keys


def chooser_for(
    preset: str, profile: Profile, sizes: dict[str, int], *, degree: int, **caps: int
) -> Chooser:
    """A preset's chooser, or a baseline's. ``caps``: as for :func:`preset_keys`."""
    if preset in BASELINES:
        return make_baseline(preset, profile, sizes, degree=degree)
    return make_chooser(profile, DataCentricArguments(**preset_keys(preset, degree=degree, **caps)))


def simulate_video(num_ranks: int, distribution: str, num_samples: int) -> dict[str, Any]:
    """Tokens per second and imbalance of every preset over one epoch of the same samples."""
    per_node = min(num_ranks, 8)
    cluster = Cluster.preset("h100", num_nodes=num_ranks // per_node, devices_per_node=per_node)
    drawn = draw_buckets(video_buckets(), num_samples, distribution)
    row = {"world": num_ranks, "distribution": distribution}
    return row | {"presets": video_epoch(VideoCost(cluster), drawn)}


def video_epoch(
    cost: VideoCost, drawn: list[Bucket], presets: Sequence[str] = ORDER, **caps: int
) -> dict[str, Any]:
    """The figures of presets over one epoch of these samples.

    ``caps``: most and least accumulation of those that accumulate, see :func:`preset_keys`.
    """
    num_ranks, by_name = cost.cluster.num_ranks, {b.name: b for b in video_buckets()}
    profile = cost.profile(list(by_name.values()), memory_bytes=MEMORY_BYTES, max_batch=512)
    tokens = sum(cost.num_tokens(bucket) for bucket in drawn)
    names = [bucket.name for bucket in drawn]
    sizes = {bucket.name: bucket.size for bucket in by_name.values()}
    found = {}
    for preset in presets:
        chooser = chooser_for(preset, profile, sizes, degree=FIXED_DEGREE, **caps)
        iterations = list(epoch_iterations(chooser, names, num_ranks, seed=0, epoch=0))
        seconds = [
            np.repeat(
                [group_seconds(cost, by_name, g, packed=preset == "packed") for g in it.groups],
                [group.degree for group in it.groups],
            )
            for it in iterations
        ]
        total = sum(each.max() + profile.sync_seconds for each in seconds)
        found[preset] = {
            "tokens_per_second": float(tokens / total),
            "imbalance": epoch_imbalance(seconds),
            "iterations": len(iterations),
            "samples_per_iteration": len(drawn) / len(iterations),
            "idle_share": sum(it.idle_ranks for it in iterations) / (num_ranks * len(iterations)),
        }
    return found


def group_seconds(
    cost: VideoCost, buckets: dict[str, Bucket], group: RankGroup, *, packed: bool
) -> float:
    """What a group's micro-batches take; packed ones go through the model as one."""
    batches = [[(buckets[b.bucket], b.batch_size)] for b in group.micro_batches]
    keeps = [dict(b.keep) for b in group.micro_batches]
    if packed and batches:
        batches, keeps = [[part for parts in batches for part in parts]], keeps[:1]
    return sum(
        (4 * DEPTH - keep[kind]) * cost.block_seconds(kind, group.degree, parts)
        for parts, keep in zip(batches, keeps, strict=True)
        for kind in KINDS
    )


def simulate_text(num_ranks: int) -> dict[str, Any]:
    """Seconds of a layer per million tokens, the same documents: presets, and planned attention."""
    per_node = min(num_ranks, 8)
    cluster = Cluster.preset("h100", num_nodes=num_ranks // per_node, devices_per_node=per_node)
    rng = np.random.default_rng(0)
    batches = [draw_lengths("ldc", 1, rng) for _ in range(TEXT_BATCHES)]
    lengths = np.array([length for batch in batches for length in batch])
    # every length is a bucket of its own: what batching by rounded lengths loses is left out
    exact = [Bucket(f"{n} tokens", (n,)) for n in sorted(set(lengths.tolist()))]
    sizes = {bucket.name: bucket.size for bucket in exact}
    names = [f"{n} tokens" for n in lengths.tolist()]
    cost = TextCost(cluster, TEXT_SPEC)
    profile = cost.profile(exact, max_batch=64)
    row: dict[str, Any] = {"world": num_ranks, "documents": len(lengths), "presets": {}}
    for preset in ("bucket", "intra", "inter"):
        chooser = chooser_for(preset, profile, sizes, degree=FIXED_DEGREE)
        iterations = list(epoch_iterations(chooser, names, num_ranks, seed=0, epoch=0))
        seconds = [iteration.rank_seconds() for iteration in iterations]
        total = sum(float(each.max()) for each in seconds)
        row["presets"][preset] = {
            "seconds": total,
            "imbalance": epoch_imbalance(seconds),
            "iterations": len(iterations),
            "tokens_per_iteration": float(lengths.sum() / len(iterations)),
        }
    budget = TokenBudgetBatches(lengths, TEXT_TOKENS, seed=0)
    plans = [
        plan(SequenceBatch(lengths[batch[:, 0]], "causal"), TEXT_SPEC, cluster)
        for batch in budget.epoch(0)
    ]
    row["presets"]["auto"] = {
        "seconds": sum(made.stats.layer_seconds for made in plans),
        "imbalance": 1 - 1 / float(np.mean([made.stats.compute_balance for made in plans])),
        "iterations": len(plans),
        "tokens_per_iteration": float(lengths.sum() / len(plans)),
    }
    return row


# --------------------------------------------------------------------------- measured


def measure_video(num_processes: int) -> dict[str, Any]:
    """One epoch of the small video model with every preset, on local ranks."""
    options = MEASURED | {
        "job": "video",
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "video_samples": 200,
        "memory_limit_mb": 20,  # the longest videos need two ranks, short ones may keep activations
    }
    return _measure(options, ORDER, num_processes, degree=LOCAL_DEGREE)


def measure_text(num_processes: int) -> dict[str, Any]:
    """One epoch of the small Llama with every preset, and with planned attention."""
    options = MEASURED | {
        "job": "data-centric",
        "config_overrides": "hidden_size=64,intermediate_size=192,num_hidden_layers=3,"
        "num_key_value_heads=4",
        "max_documents": 120,
        "max_seqlen": 2048,
    }
    presets = ("bucket", "intra", "inter", "inter+PAC", "auto")
    return _measure(options, presets, num_processes, degree=1)


def _measure(
    options: Options, presets: tuple[str, ...], num_processes: int, *, degree: int
) -> dict[str, Any]:
    """Train an epoch with each preset from one profile; ``auto`` is planned attention."""
    found: dict[str, Any] = {"config": options, "presets": {}}
    with tempfile.TemporaryDirectory(prefix="dcp-data-centric-") as name:
        folder = Path(name)
        path = str(folder / "profile.json")
        options = options | {"profile_path": path, "output_dir": str(folder / "profile")}
        all_degrees = options | {"preset": "inter", "profile_only": True}
        launch(all_degrees, num_processes=num_processes)
        for preset in presets:
            output = folder / preset
            # enough for an epoch with any preset; what is beyond the first is left out below
            steps = _epoch_steps(preset, options, num_processes, degree=degree)
            job = options | {"output_dir": str(output), "max_steps": steps}
            if preset == "auto":
                launch(planned(job), num_processes=num_processes)
            elif preset in BASELINES:
                job |= preset_keys(preset, degree=degree)
                launch_baseline(preset, job, num_processes=num_processes)
            else:
                job |= preset_keys(preset, degree=degree)
                launch(job, num_processes=num_processes)
            lines = (output / METRICS).read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "loss" in row]
            found["presets"][preset] = _epoch_figures(rows)
        found["profile_cases"] = len(Profile.load(path).found)
    return found


def planned(options: Options) -> Options:
    """The same model and documents, trained with planned attention."""
    foreign = DataCentricArguments.__dataclass_fields__.keys()
    kept = {name: value for name, value in options.items() if name not in foreign}
    return kept | {"job": PLANNED}


def _epoch_steps(preset: str, options: Options, num_ranks: int, *, degree: int) -> int:
    """Optimiser steps of the first epoch, which every rank can tell, and so can we."""
    from torch import device

    from dcp.datacentric.trainer import open_workload

    here = options | {"use_cpu": True}
    workload = open_workload(arguments_of(here), device("cpu"))
    seed = options["seed"]
    if preset == "auto":
        lengths = np.array([workload.num_tokens([i]) for i in range(len(workload.bucket_of))])
        *_, batches, _ = arguments_of(planned(here))
        budget = TokenBudgetBatches(lengths, batches.tokens_per_batch, seed=seed)
        return sum(1 for _ in budget.epoch(0))
    profile = Profile.load(options["profile_path"])
    chooser = chooser_for(preset, profile, bucket_sizes(profile), degree=degree)
    return sum(
        1 for _ in epoch_iterations(chooser, workload.bucket_of, num_ranks, seed=seed, epoch=0)
    )


def _epoch_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the first epoch's steps, the first of all left out: it warms up."""
    rows = [row for row in rows if row.get("data_epoch", 0) == 0][1:]  # planned jobs run just it
    tokens, seconds = (sum(row[key] for row in rows) for key in ("num_tokens", "seconds"))
    figures = {"steps": len(rows), "tokens_per_second": tokens / seconds, "loss": rows[-1]["loss"]}
    for kind in ("predicted", "measured"):
        if f"{kind}_rank_seconds" in rows[0]:
            per_step = [row[f"{kind}_rank_seconds"] for row in rows]
            figures[f"{kind}_imbalance"] = epoch_imbalance(per_step)
            figures[f"{kind}_seconds"] = float(np.max(per_step, axis=1).sum())
    return figures


# --------------------------------------------------------------------------- output


def as_text(part: str, found: dict[str, Any]) -> str:
    """Markdown tables, as docs/measured.md shows them."""
    if part == "simulate":
        return "\n".join([*_video_table(found["video"]), "", *_text_table(found["text"])])
    lines = [
        "| preset | tokens/s | predicted imbalance | measured imbalance | steps |",
        "|---" * 5 + "|",
    ]
    for name, row in found["presets"].items():
        shares = [
            f"{row[key]:.1%}" if key in row else ""
            for key in ("predicted_imbalance", "measured_imbalance")
        ]
        lines.append(
            f"| {name} | {row['tokens_per_second']:,.0f} | {' | '.join(shares)} | {row['steps']} |"
        )
    return "\n".join(lines)


def _video_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| GPUs, distribution | " + " | ".join(ORDER) + " |",
        "|---" * (len(ORDER) + 1) + "|",
    ]
    for row in rows:
        base = row["presets"]["bucket"]["tokens_per_second"]
        cells = []
        for name, figures in row["presets"].items():
            text = f"{figures['tokens_per_second'] / base:.2f}x, {figures['imbalance']:.1%}"
            known = PUBLISHED[row["distribution"]]
            if row["world"] == 32 and name in known:
                text += f" (published {known[name]:.2f}x)"
            cells.append(text)
        lines.append(f"| {row['world']}, {row['distribution']} | " + " | ".join(cells) + " |")
    return lines


def _text_table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["presets"])
    lines = ["| GPUs | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [
            f"{figures['seconds'] * 1e3:.2f} ms, {figures['iterations']} iterations"
            for figures in row["presets"].values()
        ]
        lines.append(f"| {row['world']} | " + " | ".join(cells) + " |")
    return lines
