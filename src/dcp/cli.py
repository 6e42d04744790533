"""The ``dcp`` command: what it can do, and what starts only when it is asked for.

It stands on argparse: its parsers start in milliseconds, its errors fit one line, and Trainer's
options, most of all there are, come from transformers' parser, which is argparse's too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dcp import __version__
from dcp.launch.command import CommandParser, run_command, run_guarded
from dcp.launch.ending import ending_on_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 on success and 2 for a mistake of the user."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:  # its parser is transformers' own
        return run_guarded("dcp train", lambda: _train(words[1:]))
    return run_command("dcp", lambda: _build_parser(words), words)


def _train(words: list[str]) -> int:
    from dcp.jobs import run

    return ending_on_sigterm(run)(words)


@dataclass(frozen=True)
class _Command:
    """A command whose module is imported only when it is asked for: it may import torch and more.

    SIGTERM ends what it started, too, as Ctrl-C does.
    """

    help: str
    module: str
    add: str = "add_arguments"

    def fill(self, parser: argparse.ArgumentParser) -> None:
        module = import_module(self.module)
        getattr(module, self.add)(parser)
        run = parser.get_default("run") or module.run
        parser.set_defaults(run=ending_on_sigterm(run))


_GROUPS: dict[str, dict[str, _Command]] = {
    "plan": {
        "plan": _Command("plan a batch, and show what it costs", "dcp.plan_command", "add_plan"),
        "compare": _Command("every strategy, side by side", "dcp.plan_command", "add_compare"),
    },
    "train and serve": {
        "train": _Command("train a model here or on a cluster", "dcp.jobs", "add_arguments"),
        "generate": _Command("continue prompts over several ranks", "dcp.inference.command"),
        "serve": _Command("a model by OpenAI's routes, over ranks", "dcp.inference.server.command"),
    },
    "this machine": {
        "doctor": _Command("check that everything a run needs works here", "dcp.doctor"),
        "profile": _Command("measure this cluster, write a cluster file", "dcp.profile"),
        "bench kernels": _Command("attention kernels beside torch's", "dcp.bench.kernels"),
        "bench compiled": _Command("what our kernels compile to; no GPU", "dcp.bench.compiled"),
    },
    "the shell": {
        "completion": _Command("complete dcp's words: bash, zsh, tcsh", "dcp.cli", "_completion"),
    },
}
_COMMANDS = {name: command for group in _GROUPS.values() for name, command in group.items()}


def _build_parser(words: Sequence[str], *, all_filled: bool = False) -> CommandParser:
    """All commands; only the one asked for has its options, if not ``all_filled``."""
    parser = CommandParser(
        prog="dcp",
        description="Planned context parallelism for PyTorch.",
        epilog=_listed(_GROUPS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dcp {__version__}")
    levels: dict[tuple[str, ...], Any] = {
        (): parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    }
    for name, command in _COMMANDS.items():
        *above, last = name.split()
        for depth in range(1, len(above) + 1):
            key = tuple(above[:depth])
            if key not in levels:
                about = {"help": key[-1]} if all_filled else {}
                level = levels[key[:-1]].add_parser(key[-1], **about)
                what = level.add_subparsers(dest=f"{key[-1]}_what", required=True, metavar="WHAT")
                levels[key] = what
        # with help= argparse would list commands once more, and shtab completes only those
        shown = {"help": command.help} if all_filled else {}
        one = levels[tuple(above)].add_parser(last, description=command.help, **shown)
        if all_filled or list(words[: len(above) + 1]) == name.split():
            command.fill(one)
    return parser


def _listed(groups: Mapping[str, Mapping[str, _Command]]) -> str:
    lines = []
    for title, commands in groups.items():
        lines += [f"{title}:", *(f"  {name:15}{each.help}" for name, each in commands.items()), ""]
    return "\n".join([*lines, "dcp COMMAND --help shows a command's options."])


def _completion(parser: argparse.ArgumentParser) -> None:
    from shtab import SUPPORTED_SHELLS, complete

    def run(args: argparse.Namespace) -> int:
        print(complete(_build_parser([], all_filled=True), args.shell))
        return 0

    parser.description = 'such as: eval "$(dcp completion bash)"'
    parser.add_argument("shell", choices=SUPPORTED_SHELLS)
    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
