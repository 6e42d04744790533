"""``dcp train``: which jobs there are, their options, and one rank of a job.

The only place that knows all jobs: ``--job``, or the key ``job`` of a configuration, names one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcp.datacentric.config import TextConfig, VideoConfig
from dcp.errors import DCPError
from dcp.launch.environment import is_launched
from dcp.train.config import JobConfig, TrainConfig
from dcp.train.keys import read_values

if TYPE_CHECKING:  # torch takes a second, which no mistake in a configuration should cost
    import torch
    import torch.distributed as dist

    from dcp.train.loop import TrainingLoop

JOBS: dict[str, type[JobConfig]] = {
    each.job: each for each in (TrainConfig, TextConfig, VideoConfig)
}
DEFAULT = TrainConfig.job

# --------------------------------------------------------------------------- configuration


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> JobConfig:
    """The configuration of a job, from a YAML or JSON file (None: the defaults) and ``overrides``.

    The key ``job`` says which job; without it attention is planned. A key that only other jobs have
    raises ``ValueError``, which says which.
    """
    values, given = {} if path is None else read_values(Path(path)), dict(overrides or {})
    job = {"job": DEFAULT, **values, **given}["job"]
    if not isinstance(job, str) or job not in JOBS:
        raise ValueError(f"job must be one of {', '.join(JOBS)}, got {job!r}")
    for name in values:
        _refuse_foreign(name, job, f"{path}: config key {name}")
    for name in given:
        _refuse_foreign(name, job, _option(name))
    return JOBS[job].from_mapping({**values, **given, "job": job}, where=str(path or "options"))


def _refuse_foreign(name: str, job: str, shown: str) -> None:
    """``ValueError`` where other jobs have the key and this one has not."""
    owners = [other for other, config in JOBS.items() if name in config.__dataclass_fields__]
    if owners and job not in owners:
        raise ValueError(f"{shown} belongs to --job {' and '.join(owners)}, this is --job {job}")


# --------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """A config file, ``--job``, ``--num-processes``, and one option per key of any job.

    Only the keys of the job that ``words`` name are shown; the others are there to be refused.
    """
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML or JSON file")
    parser.add_argument(
        "--job",
        choices=JOBS,
        help=f"planned attention, or one of the data-centric jobs, which have options of their own "
        f"(default: the file's, or {DEFAULT}); --job NAME --help shows them",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="local processes to start; under torchrun its processes are used",
    )
    shown = _job_in(words)
    added: set[str] = set()
    for config in sorted(JOBS.values(), key=lambda config: config.job != shown):
        for name, kind, default, text in config.options():
            if name not in added:
                _add_option(parser, name, kind, default, text if config.job == shown else None)
                added.add(name)


def _job_in(words: Sequence[str]) -> str:
    """The job whose options are to be shown."""
    asking = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asking.add_argument("--job")
    job = asking.parse_known_args(words)[0].job
    return job if job in JOBS else DEFAULT


def _add_option(
    parser: argparse.ArgumentParser, name: str, kind: Any, default: Any, text: str | None
) -> None:
    if text is None:
        text = argparse.SUPPRESS
    else:
        text += "" if default is None else f" (default {default!r})"
        text = text.replace("%", "%%")
    more: dict[str, Any] = {"type": kind, "metavar": getattr(kind, "__name__", "").upper()}
    if kind in (bool, bool | None):
        more = {"action": argparse.BooleanOptionalAction}
    parser.add_argument(_option(name), default=None, dest=name, help=text, **more)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(args: argparse.Namespace) -> int:
    """Train; the exit status. Mistakes of the user raise ``ValueError`` before anything starts."""
    names = {"job"}.union(*(config.__dataclass_fields__ for config in JOBS.values()))
    given = {name: value for name, value in vars(args).items() if name in names}
    config = load_config(args.config, {k: v for k, v in given.items() if v is not None})
    if not is_launched():
        launch(config, num_processes=args.num_processes)
        return 0
    try:
        run_rank(config)
    except DCPError as error:
        print(f"dcp train: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    return 0


# --------------------------------------------------------------------------- ranks


def launch(config: JobConfig, *, num_processes: int) -> None:
    """Train on ``num_processes`` local ranks and wait; raises as :func:`run_ranks` does.

    The first rank keeps the terminal; the others write to ``logs/`` of the output folder.
    """
    from dcp.launch.ranks import run_ranks

    logs = Path(config.output) / "logs"
    run_ranks("dcp.jobs:train", config.to_json(), num_processes=num_processes, logs=logs)


def open_trainer(
    config: JobConfig, group: dist.ProcessGroup, device: torch.device
) -> TrainingLoop[Any, Any]:
    """The training loop of the job that the configuration is of."""
    if isinstance(config, TrainConfig):
        from dcp.report.plan_page import write_plan_page
        from dcp.train.trainer import Trainer

        return Trainer(config, group, device, draw_plan=write_plan_page)
    from dcp.datacentric.trainer import DataCentricTrainer

    assert isinstance(config, TextConfig | VideoConfig)
    return DataCentricTrainer(config, group, device)


def run_rank(
    config: JobConfig, *, open_trainer: Callable[..., TrainingLoop[Any, Any]] = open_trainer
) -> None:
    """Join the group that the environment describes and train.

    ``open_trainer`` is called with configuration, group and device. Raises ``RankLost`` within
    ``config.timeout_seconds`` and some seconds where another rank dies.
    """
    import torch

    from dcp.launch.group import choose_device, joined_group
    from dcp.launch.heartbeat import Heartbeat

    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    joined = joined_group(device, timeout_seconds=config.timeout_seconds)
    with joined as group, Heartbeat(group) as heartbeat:
        try:
            with open_trainer(config, group, device) as trainer:
                trainer.train()
        except RuntimeError as error:  # also what torch raises when communication fails
            raise heartbeat.explain(error) from error


def train(job: dict[str, Any]) -> None:
    """The work of a rank that :func:`launch` started."""
    run_rank(load_config(None, job))
