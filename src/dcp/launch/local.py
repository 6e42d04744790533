"""Ranks as processes of this machine, which meet through a file: no port to choose or to lose."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dcp.train.process import choose_device, nccl_options

TIMEOUT = timedelta(seconds=300)


def run_ranks(module: str, words: Sequence[str], *, processes: int, per_node: int) -> None:
    """Run ``python -m module words… --store FILE`` once per rank and wait for all.

    Args:
        per_node: how many of the processes count as one node.

    Raises ``ValueError`` where a rank fails; its message is on the terminal.
    """
    home = str(Path(__file__).resolve().parents[2])
    started: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="dcp-ranks-") as folder:
        command = [sys.executable, "-m", module, *words, "--store", f"{folder}/store"]
        try:
            for rank in range(processes):
                variables = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank % per_node),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(per_node),
                    "PYTHONPATH": os.pathsep.join(
                        filter(None, [home, os.environ.get("PYTHONPATH")])
                    ),
                }
                started.append(subprocess.Popen(command, env=os.environ | variables))
            failed = [rank for rank, process in enumerate(started) if process.wait()]
        finally:
            for process in started:
                process.kill()
                process.wait()
    if failed:
        raise ValueError(f"ranks {failed} of {module} failed; their messages are above")


@contextmanager
def joined_group(store: str | None) -> Iterator[torch.device]:
    """This rank's device, while the default group is up.

    Args:
        store: the file of :func:`run_ranks`; None under torchrun, which names a meeting place.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if store else choose_device("auto")
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(store, size) if store else None,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        pg_options=nccl_options(TIMEOUT) if device.type == "cuda" else None,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()
