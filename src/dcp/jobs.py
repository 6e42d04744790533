"""``dcp train``: which jobs there are, their options, and one rank of a job.

A job is a dictionary of options that were given, which JSON can hold: what the launcher hands to
its ranks, what ``config.json`` keeps, and what a configuration file has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.hf_argparser import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from dcp.checks import meant
from dcp.datacentric.config import DataCentricArguments, VideoArguments
from dcp.errors import DCPError
from dcp.launch.environment import is_launched
from dcp.launch.group import choose_device, joined_group
from dcp.launch.heartbeat import Heartbeat
from dcp.train.arguments import (
    FROM_SCRATCH,
    OUTPUT,
    STEPS,
    BatchArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    check_run,
)
from dcp.train.files import read_values

PLANNED = "planned"
JOBS: dict[str, tuple[Any, ...]] = {
    PLANNED: (ModelArguments, DataArguments, BatchArguments, RunArguments),
    "data-centric": (ModelArguments, DataArguments, DataCentricArguments, RunArguments),
    "video": (VideoArguments, DataCentricArguments, RunArguments),
}
WORK = {
    PLANNED: "dcp.train.planned:train",
    "data-centric": "dcp.datacentric.trainer:train",
    "video": "dcp.datacentric.trainer:train",
}
Options = dict[str, Any]

# --------------------------------------------------------------------------- options


class TrainParser(HfArgumentParser):
    """transformers' parser of dataclasses, whose errors are ours to show."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_parser(job: str) -> TrainParser:
    """The options of a job."""
    parser = TrainParser(
        JOBS.get(job, JOBS[PLANNED]),
        prog="dcp train",
        usage="dcp train [CONFIG] [--OPTION VALUE ...]",
        description="Train a model with planned attention, on this machine or a cluster. CONFIG is "
        "a YAML or JSON file of options.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--job",
        choices=JOBS,
        default=PLANNED,
        help="planned attention, or a data-centric job, which have options of their own",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="local processes to start; under torchrun its processes are used",
    )
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a planned job, for completion: :func:`run` reads words by itself."""
    for action in build_parser(PLANNED)._actions:
        if action.option_strings and "--help" not in action.option_strings:
            parser._add_action(action)


def read_options(words: Sequence[str]) -> tuple[Options, int]:
    """What a file and options say of a job, and the number of processes to start.

    The first word may be a file, whose keys are options; options win over it. Raises ``ValueError``
    for what no job of this kind has, with what may have been meant.
    """
    config = words[0] if words and not words[0].startswith("-") else None
    values = {} if config is None else read_values(Path(config))
    written = [f"--{n}={_as_word(v)}" for n, v in values.items() if v is not None]
    words = [*written, *words[config is not None :]]
    job = _job_in(words)
    parser = build_parser(job)
    nothing = object()
    names = {action.dest: nothing for action in parser._actions}
    args, foreign = parser.parse_known_args(words, argparse.Namespace(**names))
    if foreign:
        where = f"{config}: " if foreign[0] in written else ""
        raise ValueError(where + _unknown(foreign[0].split("=")[0], job, set(names)))
    given = {name: value for name, value in vars(args).items() if value is not nothing}
    num_processes = given.pop("num_processes", 1)
    return {"job": PLANNED, **given}, num_processes


def arguments_of(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The job's dataclasses, checked; of a model from scratch with :data:`FROM_SCRATCH`.

    Makes ``TrainingArguments``, which look for a process group: join it before.
    """
    values = dict(options)
    kinds = JOBS[values.pop("job")]
    if "model" not in values or not Path(values["model"]).is_dir():
        steps = {} if "num_train_epochs" in values else {"max_steps": STEPS}
        values = FROM_SCRATCH | steps | values
    return HfArgumentParser(kinds).parse_dict(values)


def _job_in(words: Sequence[str]) -> str:
    asking = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asking.add_argument("--job", default=PLANNED)
    return str(asking.parse_known_args(words)[0].job)


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _unknown(word: str, job: str, known: set[str]) -> str:
    """What is wrong with an option that a job has not."""
    name = word.lstrip("-").replace("-", "_")
    shown = f"--{name.replace('_', '-')}"
    owners = [
        other
        for other, kinds in JOBS.items()
        if any(name in kind.__dataclass_fields__ for kind in kinds)
    ]
    if owners:
        return f"{shown} belongs to --job {' and '.join(owners)}, this is --job {job}"
    if not word.startswith("-"):
        return f"{word!r} is no option: a configuration file comes first"
    options = ["--" + each.replace("_", "-") for each in known]
    return f"unknown option {word}{meant(shown, options)}"


# --------------------------------------------------------------------------- running


def run(words: Sequence[str]) -> int:
    """Train; the exit status. Mistakes of the user raise ``ValueError``."""
    options, num_processes = read_options(words)
    check_run(options)
    for kind in JOBS[options["job"]]:
        if kind is not RunArguments:  # which would look for devices
            names = kind.__dataclass_fields__.keys() & options.keys()
            kind(**{name: options[name] for name in names})
    if not is_launched():
        launch(options, num_processes=num_processes)
        return 0
    try:
        train(options)
    except DCPError as error:
        print(f"dcp train: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    return 0


def launch(options: Options, *, num_processes: int, work: str = "dcp.jobs:train") -> None:
    """Train on ``num_processes`` local ranks and wait; raises as :func:`run_ranks` does.

    The first rank keeps the terminal; the others write to ``logs/`` of the output folder.
    """
    from dcp.launch.ranks import run_ranks

    logs = Path(options.get("output_dir", OUTPUT)) / "logs"
    run_ranks(work, options, num_processes=num_processes, logs=logs)


def train(options: Options) -> None:
    """The work of a rank: join the group that the environment describes, and train.

    Raises ``RankLost`` within ``ddp_timeout`` and some seconds where another rank dies.
    """
    module, _, function = WORK[options["job"]].partition(":")
    run_job(options, getattr(import_module(module), function))


def run_job(options: Options, work: Callable[..., Any]) -> None:
    """Call ``work`` with the job's options, its arguments, group and device, in the group."""
    threads = int(options.get("threads", RunArguments.threads))
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else accelerate warns that it does so
    disable_progress_bar()  # of reading and writing weights
    device = choose_device("cpu" if options.get("use_cpu") else "auto")
    timeout = float(options.get("ddp_timeout", RunArguments.ddp_timeout))
    with joined_group(device, timeout_seconds=timeout) as group, Heartbeat(group) as heartbeat:
        try:
            arguments = arguments_of({"use_cpu": device.type == "cpu", **options})
            work(options, arguments, group, device)
        except RuntimeError as error:  # also what torch raises when communication fails
            raise heartbeat.explain(error) from error
