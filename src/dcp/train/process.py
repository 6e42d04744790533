"""One rank of a training job: ``python -m dcp.train.process``, started by the launcher; torchrun's
ranks come here from ``dcp train``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dcp.data.messages import PlanningError
from dcp.datacentric.trainer import DataCentricTrainer
from dcp.train.config import TrainConfig
from dcp.train.heartbeat import Heartbeat, RankLost
from dcp.train.trainer import Trainer


def run_rank(config: TrainConfig, *, listen_fd: int | None = None) -> None:
    """Join the group that the environment describes (as torchrun sets it) and train.

    ``listen_fd`` is the first rank's inherited listening socket for the store, if there is one.
    Raises ``RankLost`` within ``config.timeout_seconds`` and some seconds where another rank dies.
    """
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    joined = joined_group(device, timeout_seconds=config.timeout_seconds, listen_fd=listen_fd)
    with joined as group, Heartbeat(group) as heartbeat:
        try:
            with open_trainer(config, group, device) as trainer:
                trainer.train()
        except RuntimeError as error:  # also what torch raises when communication fails
            raise heartbeat.explain(error) from error


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


def open_trainer(
    config: TrainConfig, group: dist.ProcessGroup, device: torch.device
) -> Trainer | DataCentricTrainer:
    """The training loop that the configuration asks for."""
    make = DataCentricTrainer if config.is_data_centric else Trainer
    return make(config, group, device)


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


def train(folder: Path, listen_fd: int | None) -> None:
    """The work of a rank that the launcher started for ``dcp train``."""
    run_rank(TrainConfig.load(folder / "config.json"), listen_fd=listen_fd)


def main(argv: list[str], work: Callable[[Path, int | None], None] = train) -> int:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
