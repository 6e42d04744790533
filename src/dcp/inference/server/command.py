"""The ``dcp serve`` command: a model behind OpenAI's routes, over N local ranks."""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from dcp.batch import DTYPE_BYTES
from dcp.checks import whole
from dcp.inference.command import MOST_COUNT, MOST_SEED, add_tensor_parallel, check_tensor_parallel
from dcp.inference.turn import STRATEGIES
from dcp.launch.environment import is_launched

NEEDED = ("transformers", "fastapi", "uvicorn", "prometheus_client")
_COUNTS = ("max_length", "max_running", "token_budget", "num_pages", "page_size", "num_processes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    text = "folder of a Hugging Face model and tokenizer (default: a tiny random one over bytes)"
    parser.add_argument("--model", metavar="FOLDER", help=text)
    parser.add_argument("--name", help="what clients call the model (default: its folder's name)")
    text = "local ranks; under torchrun its processes are used"
    parser.add_argument("--num-processes", type=int, default=1, metavar="N", help=text)
    add_tensor_parallel(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    text = "default: %(default)s; 0 takes a free one"
    parser.add_argument("--port", type=int, default=8000, help=text)
    text = "most tokens of prompt and reply together (default: what model and cache hold)"
    parser.add_argument("--max-length", type=int, metavar="N", help=text)
    text = "requests that may wait; more are refused with 429 (default: %(default)s)"
    parser.add_argument("--max-queue", type=int, default=128, metavar="N", help=text)
    text = "requests in a step (default: as many as the token budget takes)"
    parser.add_argument("--max-running", type=int, metavar="N", help=text)
    text = "conversations that stay for prompts that begin alike (default: %(default)s; 0: none)"
    parser.add_argument("--max-kept", type=int, default=64, metavar="N", help=text)
    text = "most tokens of a step; longer prompts enter in chunks (default: %(default)s)"
    parser.add_argument("--token-budget", type=int, default=2048, metavar="N", help=text)
    text = f"of prompts: {', '.join(STRATEGIES)} (default: %(default)s)"
    parser.add_argument("--strategy", default="planned", choices=STRATEGIES, help=text)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPE_BYTES))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--num-pages", type=int, default=256, help="pages of each rank's KV cache")
    parser.add_argument("--page-size", type=int, default=256, help="tokens of a page")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tiny model")


def _check(args: argparse.Namespace) -> None:
    """``ValueError`` for what no rank could honour, before any is started."""
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"dcp serve needs {', '.join(lacking)}: pip install 'dynamic-context-parallel[serve]'"
        )
    for name in _COUNTS:
        if (value := getattr(args, name)) is not None:
            whole(f"--{name.replace('_', '-')}", value, least=1, most=MOST_COUNT)
    check_tensor_parallel(args)
    whole("--max-queue", args.max_queue, least=1, most=MOST_COUNT)
    whole("--max-kept", args.max_kept, most=MOST_COUNT)
    whole("--port", args.port, most=65535)
    whole("--seed", args.seed, most=MOST_SEED)
    if args.model is not None and not Path(args.model).is_dir():
        raise ValueError(f"model {args.model!r} is no folder on this machine")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM, and then until all that was asked is answered; the exit status."""
    _check(args)
    job = {name: of for name, of in vars(args).items() if name not in ("command", "run")}
    job["window_pages"] = None  # requests are let in by what global layers need
    job["name"] = args.name or (Path(args.model).resolve().name if args.model else "bytes")
    if is_launched():  # a rank that torchrun started
        from dcp.inference.server.rank import serve

        serve(job | {"drain": None})
        return 0
    from dcp.launch.ranks import run_ranks

    work = "dcp.inference.server.rank:serve"
    with tempfile.TemporaryDirectory(prefix="dcp-serve-") as folder:
        drain = Path(folder) / "drain"
        with touched_by_sigterm(drain):
            run_ranks(work, job | {"drain": str(drain)}, num_processes=args.num_processes)
    return 0


@contextmanager
def touched_by_sigterm(file: Path) -> Iterator[None]:
    """Inside, SIGTERM makes a file, at which the ranks end when all is answered; a second one ends
    them at once."""
    before = signal.getsignal(signal.SIGTERM)

    def ask(*_: object) -> None:
        file.touch()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
