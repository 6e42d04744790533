"""Joining the ranks' process group, as the environment of :func:`run_ranks` or torchrun says."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dcp.launch.ending import leaving_on_interrupt
from dcp.launch.failures import record
from dcp.runtime.communicator import CommunicationFailed
from dcp.runtime.waiting import NoAnswer, within

GRACE_SECONDS = 1.0  # for the rank that failed first to be seen
LEAVE_SECONDS = 3.0  # from Ctrl-C to the end
COMMUNICATION = (dist.DistError, CommunicationFailed, NoAnswer)


@contextmanager
def joined_group(
    device: torch.device, *, timeout_seconds: float = 600
) -> Iterator[dist.ProcessGroup]:
    """The default group of all ranks, left at the end: NCCL for CUDA devices, else gloo.

    What fails inside is recorded before the group is left, which makes other ranks fail, too.
    Ctrl-C ends the process within ``LEAVE_SECONDS`` even where it waits for other ranks.
    """
    nccl, timeout = device.type == "cuda", timedelta(seconds=timeout_seconds)
    with leaving_on_interrupt(LEAVE_SECONDS):
        within(
            timeout_seconds + LEAVE_SECONDS,
            lambda: dist.init_process_group(
                "nccl" if nccl else "gloo",
                timeout=timeout,
                pg_options=nccl_options(timeout) if nccl else None,
            ),
        )
        yield from _inside()


def _inside() -> Iterator[dist.ProcessGroup]:
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    except Exception as error:
        if type(error) is RuntimeError or isinstance(error, COMMUNICATION):
            time.sleep(GRACE_SECONDS)  # communication may have failed for want of another rank
        record(error)
        raise
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
