"""One rank that the launcher started: its device, its group, and what it leaves when it fails."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dcp.data.planning import PlanningError
from dcp.train.heartbeat import RankLost


@contextmanager
def joined_group(
    device: torch.device, *, timeout_seconds: float = 600, listen_fd: int | None = None
) -> Iterator[dist.ProcessGroup]:
    """The group that the environment describes (as torchrun sets it), left at the end."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout, store = timedelta(seconds=timeout_seconds), None
    if listen_fd is not None or "TORCHELASTIC_RUN_ID" not in os.environ:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            size,
            is_master=rank == 0,
            master_listen_fd=listen_fd,
            timeout=timeout,
        )
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        pg_options=nccl_options(timeout) if backend == "nccl" else None,
    )
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


def nccl_options(timeout: timedelta) -> dist.ProcessGroupNCCL.Options:
    """Messages of high priority: an attention launch has more thread blocks than fit at once, and
    what was started under it would else wait for the last of them."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options


def choose_device(name: str) -> torch.device:
    """``cuda`` with the local rank's number, or ``cpu``; auto asks for a GPU per local rank."""
    local_rank, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= here
    if name == "cpu" or (name == "auto" and not enough):
        return torch.device("cpu")
    if not enough:
        raise ValueError(f"device 'cuda': {torch.cuda.device_count()} GPUs for {here} processes")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def main(argv: list[str], work: Callable[[Path, int | None], None]) -> int:
    """Arguments: the launcher's folder, and the listening socket's number on the first rank.

    ``work`` is called with both; what it raises reaches the launcher as one line.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher to handle
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    folder, listen_fd = Path(argv[0]), int(argv[1]) if len(argv) > 1 else None
    try:
        work(folder, listen_fd)
    except Exception as error:
        _record(folder, error)
        return 1
    return 0


def _record(folder: Path, error: Exception) -> None:
    """Leave the launcher one line, and a traceback where the user is not to blame."""
    mistake = isinstance(error, ValueError | OSError | PlanningError | RankLost)
    message = " ".join(str(error).split())
    rank = int(os.environ["RANK"])
    failure = {
        "rank": rank,
        "time": time.time(),
        "error": message if mistake else f"{type(error).__name__}: {message[:500]}",
        "traceback": None if mistake else traceback.format_exc(),
    }
    draft = folder / f"draft-{rank}.json"
    draft.write_text(json.dumps(failure))
    draft.rename(folder / f"failure-{rank}.json")


def _end_with_launcher() -> None:
    """The launcher's end of stdin closes when it dies, however it dies."""
    os.read(0, 1)
    os._exit(1)
