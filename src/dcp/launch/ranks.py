"""The one way to start ranks on this machine: :func:`run_ranks`, on torch's elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dcp.launch.environment import child_environment
from dcp.launch.failures import FAILURE_LOG, first_failure
from dcp.launch.rank import RESULT, TASK

PROCESS_BYTES = 400 * 2**20  # of torch, a small model and its batch, in one process
POLL_SECONDS = 0.05


def run_ranks(
    work: str,
    job: dict[str, Any],
    *,
    num_processes: int,
    ranks_per_node: int | None = None,
    logs: Path | None = None,
    timeout_seconds: float | None = None,
    enter: Callable[[int], Sequence[str]] | None = None,
    host: str = "127.0.0.1",
) -> list[Any]:
    """Call ``work`` with ``job`` on every rank, each a process of this machine.

    The first rank that fails ends the others. All of them end with this process, however it ends.

    Args:
        work: ``package.module:function``. It is called with the job and may join the ranks' group
            (:func:`dcp.launch.group.joined_group`).
        job: what JSON can hold; so is what ``work`` returns.
        ranks_per_node: how many ranks count as one node; None: all.
        logs: folder for ``rank-1.log``, ``rank-2.log``, … and the traceback of a failure. None:
            all ranks share the terminal, where only the first one's standard output is shown.
        timeout_seconds: a rank that takes longer fails.
        enter: words before the command of a rank, such as ``ip netns exec NODE``.
        host: this machine's address as the ranks see it.

    Returns:
        What ``work`` returned, rank by rank.

    Raises:
        ValueError: more processes than this machine can start, or fewer than one.
        JobFailed: a rank failed, the earliest one is named; the rest were ended.
    """
    _check_count(num_processes)
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / FAILURE_LOG).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="dcp-ranks-") as name, _quiet_launcher():
        task = {
            "work": work,
            "job": job,
            "launcher": os.getpid(),
            "ranks_per_node": ranks_per_node or num_processes,
            "logs": logs and str(logs.resolve()),
            "timeout_seconds": timeout_seconds,
            "enter": enter and [list(enter(rank)) for rank in range(num_processes)],
        }
        (Path(name) / TASK).write_text(json.dumps(task))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=Path(name).name,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{host}:0",  # the store takes a free port, and this process keeps it
            rdzv_configs={"is_host": True},
            local_addr=host,  # nothing is looked up
            max_restarts=0,
            monitor_interval=POLL_SECONDS,
            signals_to_handle="",  # Ctrl-C raises here as anywhere, SIGTERM where a command says so
            logs_specs=_Files(name),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "dcp.launch.rank", name)
        except ChildFailedError as error:
            raise first_failure(error.failures, logs) from None
        except BlockingIOError as error:
            raise ValueError(
                f"--num-processes {num_processes}: only some of them could start ({error})"
            ) from None
        return [
            json.loads((Path(name) / RESULT.format(rank)).read_text())
            for rank in range(num_processes)
        ]


class _Files(LogsSpecs):
    """Where ranks leave their failures, and from where they import: what this process would.

    Output is not torch's to redirect: the rank does it (:mod:`dcp.launch.rank`).
    """

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        errors = {rank: f"{self.root_log_dir}/error-{rank}.json" for rank in envs}
        for rank, variables in envs.items():
            variables["TORCHELASTIC_ERROR_FILE"] = errors[rank]
            variables["PYTHONPATH"] = child_environment()["PYTHONPATH"]
        terminal = dict.fromkeys(envs, "")
        return LogsDest(stdouts=terminal, stderrs=terminal, error_files=errors)

    @property
    def root_log_dir(self) -> str:
        assert self._root_log_dir is not None
        return self._root_log_dir


def _check_count(num_processes: int) -> None:
    if num_processes < 1:
        raise ValueError(f"--num-processes must be 1 or more, got {num_processes}")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    except (OSError, StopIteration):
        return  # not Linux: starting them will tell
    if num_processes * PROCESS_BYTES > free:
        raise ValueError(
            f"--num-processes {num_processes} is more than this machine can start: with "
            f"{free / 2**30:.1f} GiB of free memory it is {max(free // PROCESS_BYTES, 1)} at most"
        )


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Torch's launcher says nothing: the line of :class:`JobFailed` says it all."""
    logger, nobody = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(nobody)
    try:
        yield
    finally:
        logger.removeHandler(nobody)
        logger.propagate = before
