"""The ``dcp train`` command: read the configuration, then run here, under torchrun, or on N
local processes."""

from __future__ import annotations

import argparse
import os
import sys

from dcp.train.config import TrainConfig, options
from dcp.train.launch import JobFailed, launch


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
        from dcp.data.messages import PlanningError
        from dcp.train.heartbeat import RankLost
        from dcp.train.process import run_rank

        try:
            run_rank(config)
        except (RankLost, PlanningError) as error:
            print(f"dcp train: rank {os.environ['RANK']}: {error}", file=sys.stderr)
            return 1
        return 0
    try:
        launch(config, num_processes=args.num_processes)
    except JobFailed as error:
        print(f"dcp train: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run ``dcp train`` with these arguments; for scripts and tests."""
    parser = argparse.ArgumentParser(prog="dcp train")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"dcp train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
