"""A rank of ``test_frozen.py``: ``python -m tests.frozen_work KIND SECONDS``."""

import sys

import torch
import torch.distributed as dist

from dcp.launch.group import joined_group
from dcp.launch.heartbeat import Heartbeat
from tests.loading import loader_of


def reduce_for_ever(group, seconds):
    numbers = torch.ones(1)
    while True:
        dist.all_reduce(numbers, group=group)
        yield


def load_for_ever(group, seconds):
    """Rank 0 plans, and the others have nothing but its shares to wait for."""
    with loader_of(group=group, timeout_seconds=seconds) as loader:
        while True:
            for _ in loader:
                yield


def main(kind, seconds):
    joined = joined_group(torch.device("cpu"), timeout_seconds=seconds)
    with joined as group, Heartbeat(group) as heartbeat:
        try:
            steps = {"reduce": reduce_for_ever, "load": load_for_ever}[kind](group, seconds)
            for number, _ in enumerate(steps):
                if number == 3:
                    print("running", flush=True)
        except RuntimeError as error:
            raise heartbeat.explain(error) from error


if __name__ == "__main__":
    try:
        main(sys.argv[1], float(sys.argv[2]))
    except RuntimeError as error:
        sys.exit(f"rank {dist.get_rank() if dist.is_initialized() else ''}: {error}")
