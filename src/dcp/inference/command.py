"""The ``dcp generate`` command: prompts in, the model's continuations out, over N local ranks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dcp.batch import DTYPE_BYTES
from dcp.checks import number, whole
from dcp.inference.turn import STRATEGIES
from dcp.launch.environment import is_launched

MOST_SEED, MOST_COUNT = 2**63 - 1, 2**31 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    text = "a prompt; give several to continue them side by side"
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help=text)
    text = "said by the user after the reply, to all conversations; once for each further turn"
    parser.add_argument("--then", action="append", default=[], metavar="TEXT", help=text)
    text = "folder of a Llama-like Hugging Face model (default: a tiny random one over bytes)"
    parser.add_argument("--model", metavar="PATH", help=text)
    text = "local ranks; under torchrun its processes are used"
    parser.add_argument("--num-processes", type=int, default=1, metavar="N", help=text)
    add_tensor_parallel(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="K", help="most tokens of a reply"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest tokens")
    text = "sample from the fewest likeliest tokens whose probabilities sum up to P"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=text)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of sampling and of the tiny model"
    )
    text = f"{', '.join(STRATEGIES)} (default: %(default)s)"
    parser.add_argument("--strategy", default="planned", choices=STRATEGIES, help=text)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPE_BYTES))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--num-pages", type=int, default=64, help="pages of each rank's KV cache")
    parser.add_argument("--page-size", type=int, default=256, help="tokens of a page")
    text = "pages for layers of windows or chunks, which forget (default: --num-pages)"
    parser.add_argument("--window-pages", type=int, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print tokens, text and seconds")


def add_tensor_parallel(parser: argparse.ArgumentParser) -> None:
    """Over how many ranks weights are shared out."""
    text = "ranks that share the weights, of each node's; it divides the processes (default: 1)"
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help=text)


def check_tensor_parallel(args: argparse.Namespace) -> None:
    """``ValueError`` for what no rank could honour of :func:`add_tensor_parallel`."""
    whole("--tensor-parallel", args.tensor_parallel, least=1)
    if not is_launched() and args.num_processes % args.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel={args.tensor_parallel} does not divide "
            f"--num-processes={args.num_processes}"
        )


def _check(args: argparse.Namespace) -> None:
    """``ValueError`` for what no rank could honour, before any is started."""
    number("--temperature", args.temperature)
    if number("--top-p", args.top_p) > 1:
        raise ValueError(f"--top-p must be 1 or less, got {args.top_p}")
    whole("--seed", args.seed, most=MOST_SEED)
    for name in ("max_new_tokens", "num_pages", "page_size", "num_processes"):
        whole(f"--{name.replace('_', '-')}", getattr(args, name), least=1, most=MOST_COUNT)
    check_tensor_parallel(args)
    if args.top_k is not None:
        whole("--top-k", args.top_k, least=1)
    if args.window_pages is not None:
        whole("--window-pages", args.window_pages, least=1, most=MOST_COUNT)
    if args.model is not None and not Path(args.model).is_dir():
        raise ValueError(f"model {args.model!r} is no folder on this machine")


def run(args: argparse.Namespace) -> int:
    """Generate; the exit status. Mistakes of the user raise ``ValueError`` before ranks start."""
    _check(args)
    job = {name: of for name, of in vars(args).items() if name not in ("command", "run", "json")}
    if is_launched():  # a rank that torchrun started
        from dcp.inference.rank import generate

        found = generate(job)
    else:
        found = _launched(job, args.num_processes)
    if found is not None:
        print(json.dumps(found) if args.json else as_text(found, [args.prompt, *args.then]))
    return 0


def _launched(job: dict[str, Any], num_processes: int) -> dict[str, Any]:
    """The job on local processes."""
    from dcp.launch.ranks import run_ranks

    return run_ranks("dcp.inference.rank:generate", job, num_processes=num_processes)[0]


def as_text(found: dict[str, Any], said: list[Any]) -> str:
    """The conversations, one after another."""
    lines = []
    for index, prompt in enumerate(said[0]):
        for turn, line in zip(found["turns"], [prompt, *said[1:]], strict=True):
            lines += [f"> {line}", turn["text"][index], ""]
    first, each = found["first_token_seconds"], found["token_seconds"]
    lines.append(f"first token after {first:.3f} s, then {each * 1e3:.1f} ms per token")
    return "\n".join(lines)
