"""The ``dcp train`` command: read the configuration, then run here, under torchrun, or on N
local processes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dcp.errors import DCPError
from dcp.launch.failures import JobFailed
from dcp.train.config import TrainConfig, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments: a config file, ``--num-processes``, one option per config key."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML or JSON file")
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="local processes to start; under torchrun its processes are used",
    )
    for key, kind, default, text in options():
        name = "--" + key.replace("_", "-")
        text += "" if default is None else f" (default {default!r})"
        text = text.replace("%", "%%")
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(name, action=action, default=None, dest=key, help=text)
        else:
            parser.add_argument(
                name, type=kind, default=None, dest=key, metavar=kind.__name__.upper(), help=text
            )


def run(args: argparse.Namespace) -> int:
    """Train; the exit status. Mistakes of the user raise ``ValueError`` before anything starts."""
    given = {key: getattr(args, key) for key, *_ in options()}
    config = TrainConfig.load(args.config, {k: v for k, v in given.items() if v is not None})
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # a rank that torchrun started
        from dcp.train.rank import run_rank

        try:
            run_rank(config)
        except DCPError as error:
            print(f"dcp train: rank {os.environ['RANK']}: {error}", file=sys.stderr)
            return 1
        return 0
    try:
        launch(config, num_processes=args.num_processes)
    except JobFailed as error:
        print(f"dcp train: {error}", file=sys.stderr)
        return 1
    return 0


def launch(config: TrainConfig, *, num_processes: int) -> None:
    """Train on ``num_processes`` local ranks and wait; raises as :func:`run_ranks` does.

    The first rank keeps the terminal; the others write to ``logs/`` of the output folder.
    """
    from dcp.launch.ranks import run_ranks

    logs = Path(config.output) / "logs"
    run_ranks("dcp.train.rank:train", config.to_json(), num_processes=num_processes, logs=logs)


def main(argv: list[str] | None = None) -> int:
    """Run ``dcp train`` with these arguments; for scripts and tests."""
    parser = argparse.ArgumentParser(prog="dcp train")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"dcp train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
