"""``python -m lab inference``: time to first token, time per token, and which tensors to pass.

Measured on gloo ranks of this machine: generation beside a single process of transformers, and one
layer's attention for miss rates of 1 % to 100 %, between network namespaces of a shaped link where
they can be made. Emulated: such turns, and a step of decoding, on 4 x 8 ranks. Simulated:
Llama3-405B on 4 nodes x 8 H100, beside what arXiv 2411.01783 reports.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from dcp.batch import AttentionSpec
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.launch.ranks import run_ranks
from lab import inference_emulated
from lab import inference_paper as paper
from lab.selectors import SELECTORS, Empirical
from lab.testbed import open_testbed, why_not

SPEC = AttentionSpec(num_heads=16, num_kv_heads=1, head_dim=64, dtype="float32")
MODEL = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2}
MISS_PERCENT = (1, 2.5, 5, 7.5, 10, 15, 20, 30, 40, 50, 60, 80, 100)
PARTS = ("measured", "emulated", "simulated")
STRATEGIES = ("pass_kv", "pass_q", "planned")
PAGE_SIZE = 256
RANK = "lab.inference_rank:measure"
LIMIT_SECONDS = 420  # of one run of the ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="each wants a core of its own")
    text = "link of each rank, Mbit/s; 0: this machine's loopback (default: %(default)s)"
    parser.add_argument("--mbits", type=float, default=200, help=text)
    parser.add_argument("--tokens", type=int, default=4096, help="cached + new (default: 4096)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 4096], metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="K")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs per turn; median kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)}; others stay as --out has them")  # fmt: skip
    parser.add_argument("--nodes", type=int, default=4, help="emulated (default: %(default)s)")
    parser.add_argument("--devices-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--total-tokens", type=int, default=131_072, help="of an emulated turn")
    parser.add_argument("--dilation", type=float, default=6400.0, help="of emulated time")
    parser.add_argument("--rounds", type=int, default=1, help="of emulated turns; median kept")
    parser.add_argument("--out", type=Path, help="folder for inference.json and inference.png")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, simulate, print, write. Returns the exit status."""
    if args.ranks < 2:
        raise ValueError(f"--ranks must be 2 or more to pass anything, got {args.ranks}")
    path = args.out / "inference.json" if args.out else None
    result: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    result["conditions"] = conditions()
    if "measured" in args.only:
        result |= {"generation": generation(args), "turns": turns(args)}
    if "emulated" in args.only:
        result["emulated"] = inference_emulated.emulate(args)
    if "simulated" in args.only:
        result["simulated"] = paper.simulated()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        if {"turns", "simulated"} & result.keys():
            from lab.inference_plot import draw

            draw(result, args.out / "inference.png")
    print(json.dumps(result) if args.json else as_text(result))
    return 0


# --------------------------------------------------------------------------- measured


def turns(args: argparse.Namespace) -> dict[str, Any]:
    """Every miss rate with every strategy, and what each selector would have chosen."""
    new = [max(round(args.tokens * percent / 100), 1) for percent in MISS_PERCENT]
    job = {
        "turns": [(count, args.tokens - count) for count in new],
        "strategies": STRATEGIES,
        "spec": asdict(SPEC),
        "page_size": PAGE_SIZE,
        "repeat": args.repeat,
    }
    reason = why_not() if args.mbits else "asked for"
    if reason is None:
        with open_testbed(args.ranks, bandwidth=args.mbits * 1e6 / 8) as bed:
            found = bed.run(RANK, job | {"local_size": 1}, timeout_seconds=LIMIT_SECONDS)[0]
        link = f"{args.mbits:g} Mbit/s"
    else:
        found = run_ranks(RANK, job | {"local_size": args.ranks}, num_processes=args.ranks)[0]
        link = f"loopback ({reason})"
    cluster = Cluster(**found["cluster"])
    rows = []
    for index, count in enumerate(new):
        of = found["rows"][index * len(STRATEGIES) : (index + 1) * len(STRATEGIES)]
        rows.append(
            {"new": count, "cached": args.tokens - count} | dict(zip(STRATEGIES, of, strict=True))
        )
    seconds = [(r["new"], r["cached"], *(r[s]["seconds"] for s in STRATEGIES[:2])) for r in rows]
    fitted = Empirical.fit(seconds)
    rules = SELECTORS | {"empirical": fitted}
    for row in rows:
        row["choices"] = {
            name: rule(row["new"], row["cached"], SPEC, cluster) for name, rule in rules.items()
        }
    return {
        "link": link,
        "num_ranks": args.ranks,
        "spec": asdict(SPEC),
        "cluster": asdict(cluster),
        "empirical": asdict(fitted),
        "rows": rows,
        "regret": regret(rows),
    }


def regret(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How much longer all turns together take by each rule than by the faster way each time."""
    best = sum(min(row[name]["seconds"] for name in STRATEGIES[:2]) for row in rows)
    taken = {
        name: sum(row[row["choices"][name]]["seconds"] for row in rows)
        for name in rows[0]["choices"]
    } | {name: sum(row[name]["seconds"] for row in rows) for name in STRATEGIES}
    return {name: seconds / best - 1 for name, seconds in taken.items()}


def generation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one process of transformers, of one rank, and of all of them on the loopback."""
    job = {"model": MODEL, "prompts": args.prompts, "max_new_tokens": args.max_new_tokens}
    rows = [row | {"what": "transformers, one process"} for row in alone(job)]
    for count in sorted({1, args.ranks}):
        rows += [
            row | {"what": f"dcp, {count} rank{'s' * (count > 1)}"}
            for row in run_ranks(RANK, job, num_processes=count)[0]["rows"]
        ]
    return rows


def alone(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The same model and prompts by transformers' own generate, one thread."""
    import torch

    from dcp.inference.model import open_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, rows = open_model(None, **job["model"]), []
    for length in job["prompts"]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 256, (1, length), generator=generator)
        seconds = []
        for count in (1, 1, job["max_new_tokens"]):  # the first one warms up
            started = perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            seconds.append(perf_counter() - started)
        each = (seconds[2] - seconds[1]) / max(job["max_new_tokens"] - 1, 1)
        row = {"prompt_tokens": length, "first_token_seconds": seconds[1], "token_seconds": each}
        rows.append(row)
    torch.set_num_threads(threads)
    return rows


# --------------------------------------------------------------------------- output


def as_text(result: dict[str, Any]) -> str:
    """Markdown tables, as docs/measured.md shows them."""
    lines: list[str] = []
    if "generation" in result:
        lines += ["| | prompt tokens | first token, ms | per token, ms |", "|---" * 4 + "|"]
        for row in result["generation"]:
            first, each = row["first_token_seconds"] * 1e3, row["token_seconds"] * 1e3
            lines.append(f"| {row['what']} | {row['prompt_tokens']} | {first:.0f} | {each:.1f} |")
        found = result["turns"]
        names = [*SELECTORS, "empirical"]
        lines += [
            "",
            f"One layer's attention, ms, {found['num_ranks']} ranks, {found['link']}:",
            "",
        ]
        head = ["miss", "T", *STRATEGIES, "planned as", *names]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in found["rows"]:
            cells = [f"{row['new'] / (row['new'] + row['cached']):.1%}", str(row["new"])]
            cells += [f"{row[name]['seconds'] * 1e3:.1f}" for name in STRATEGIES]
            cells += [row["planned"]["chosen"], *(row["choices"][name] for name in names)]
            lines.append("| " + " | ".join(cells) + " |")
        shown = ", ".join(f"{name} {share:+.1%}" for name, share in found["regret"].items())
        lines += ["", f"All turns together against the faster ring each time: {shown}", ""]
    if "emulated" in result:
        lines += inference_emulated.as_text(result["emulated"])
    if "simulated" in result:
        lines += paper.as_text(result["simulated"])
    return "\n".join(lines)
