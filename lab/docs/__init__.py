"""``python -m lab draw``: the pictures and tables of docs/, from real plans and kept results."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from lab import CHECKOUT

PICTURES = {  # module of this folder, each with a function draw(docs): what it writes
    "idea": "images/idea.svg, a batch on its way to a plan",
    "plan": "images/planner.png, who computes each tile",
    "strategies": "images/strategies/*.svg, every fixed rule",
    "data_centric": "images/data_centric.png, an iteration of every preset",
    "measured": "measured.md and its pictures, from benchmarks/results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "; ".join(f"{name}: {what}" for name, what in PICTURES.items())
    parser.add_argument("--only", nargs="+", choices=PICTURES, metavar="NAME", help=about)
    text = "the pages' folder (default: the checkout's)"
    parser.add_argument("--docs", type=Path, default=CHECKOUT / "docs", help=text)


def run(args: argparse.Namespace) -> int:
    """Draw; the exit status."""
    (args.docs / "images").mkdir(parents=True, exist_ok=True)
    for name in args.only or PICTURES:
        import_module(f"{__name__}.{name}").draw(args.docs)
        print(f"{name}: {PICTURES[name]}")
    return 0
