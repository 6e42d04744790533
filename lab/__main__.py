"""``python -m lab``: the laboratory's command line, from a checkout."""

from __future__ import annotations

import sys
from importlib import import_module

from dcp.launch.command import CommandParser, run_command
from dcp.launch.ending import ending_on_sigterm

EXPERIMENTS = {  # command: its module, what it does
    "planner": ("lab.planner", "plans and planning time, beside recorded ones"),
    "limit": ("lab.limit", "predicted layers over their limit, and where the rest goes"),
    "ablation": ("lab.ablation", "what each part of the planner is worth"),
    "rules": ("lab.rules", "auto beside every rule by name, on random batches"),
    "overlap": ("lab.overlap", "what half-batches and early messages would be worth"),
    "host": ("lab.host", "what programs cost the host, without kernels and messages"),
    "simulate": ("lab.simulate", "the simulator beside real ranks on shaped links"),
    "emulate": ("lab.emulate", "strategies executed on an emulated cluster of many ranks"),
    "learn": ("lab.learn", "auto with wrong rates or a slow rank, and what it learns"),
    "attention": ("lab.attention", "every strategy on real ranks and shaped links"),
    "dynamic": ("lab.dynamic", "plans beside Megatron's schedulers, simulated"),
    "train": ("lab.train", "dcp train by several strategies on shaped links"),
    "torchtitan": ("lab.torchtitan", "torchtitan's context parallelism, simulated"),
    "trainer": ("lab.trainer", "DCPTrainer beside plain Trainer with packed rows"),
    "soak": ("lab.soak", "training while planning workers are killed, beside a run in peace"),
    "inference": ("lab.inference", "generation over ranks, and whether to pass keys or queries"),
    "serve": ("lab.serve", "dcp serve under many clients, beside single requests"),
    "data_centric": ("lab.data_centric", "data-centric parallelism beside its alternatives"),
    "short_videos": ("lab.short_videos", "why short videos gain less than published, simulated"),
    "packed_video": ("lab.packed_video", "planned attention for videos beside groups, simulated"),
    "published": ("lab.published", "the simulator beside the published microbenchmark"),
    "dryrun": ("lab.paper.dryrun", "plan many batches and run none: volume, time, balance"),
    "figures": ("lab.paper.redraw", "run and draw the paper's experiments"),
    "draw": ("lab.docs", "draw the pictures of the documentation"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one experiment; the exit status is 0 on success and 2 for a mistake of the user."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_command("python -m lab", lambda: _build_parser(words), words)


def _build_parser(words: list[str]) -> CommandParser:
    parser = CommandParser(prog="python -m lab", description="Measure what dcp claims.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="EXPERIMENT")
    for name, (module_name, about) in EXPERIMENTS.items():
        one = commands.add_parser(name, help=about)
        if words[:1] == [name]:  # its imports are paid for by whoever asks for it
            module = import_module(module_name)
            module.add_arguments(one)
            one.set_defaults(run=ending_on_sigterm(module.run))
    return parser


if __name__ == "__main__":
    sys.exit(main())
