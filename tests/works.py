"""What ranks do in the tests of launching; each is called with its job."""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = int(os.environ.get("RANK", 0))


def add_up(job):
    """The sum of all ranks' numbers, and what this rank is told about itself."""
    import torch
    import torch.distributed as dist

    from dcp.launch.group import joined_group

    print(f"rank {RANK} says hello", flush=True)
    with joined_group(torch.device("cpu")):
        total = torch.tensor([job["base"] + RANK])
        dist.all_reduce(total)
        assert dist.get_rank() == RANK
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    return {"total": int(total), "told": [int(os.environ[name]) for name in names]}


def meet(job):
    """Which network this rank is in, and whom it hears there and elsewhere."""
    import torch
    import torch.distributed as dist

    from dcp.launch.group import joined_group

    with joined_group(torch.device("cpu"), timeout_seconds=60):
        heard = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(heard, torch.tensor([RANK]))
    node = os.readlink("/proc/self/ns/net").strip("net:[]")
    cards = sorted(path.name for path in Path("/sys/class/net").iterdir())
    return {"node": node, "heard": [int(each) for each in heard], "cards": cards}


def out_of_memory_first(job):
    """Rank 3 runs out of memory and takes long to end; rank 0 aborts a second later."""
    at = job["begin"] - time.time()
    if RANK == 3:
        atexit.register(time.sleep, 5)
        time.sleep(max(at, 0))
        raise MemoryError("no room for 12 GiB")
    if RANK == 0:
        time.sleep(max(at, 0) + 1)
        os.abort()
    time.sleep(60)


def fall_out_of_the_group(job):
    """Rank 1 fails as told inside the group, while the others wait for it there."""
    import torch
    import torch.distributed as dist

    from dcp.launch.group import joined_group

    with joined_group(torch.device("cpu")):
        dist.barrier()
        if RANK == 1:
            if job["how"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"mistake": ValueError, "fault": KeyError}[job["how"]]("no such\n thing")
        dist.barrier()


def wait_beside_a_failure(job):
    """The last rank ends at once, without a word; the others have a minute to spare."""
    if int(os.environ["WORLD_SIZE"]) == RANK + 1:
        os._exit(3)
    time.sleep(60)


def leave_pids_and_wait(job):
    """This rank's process id, as a file; then a minute of nothing."""
    Path(job["folder"], str(RANK)).write_text(str(os.getpid()))
    time.sleep(60)


def cannot_return(job):
    return subprocess


def say_where(job):
    return [os.environ.get("NODE"), sys.argv[1:]]
