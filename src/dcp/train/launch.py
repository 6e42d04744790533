"""N local ranks as processes of this machine; one that fails ends the job."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROCESS_BYTES = 400 * 2**20  # of torch, a small model and its batch, in one process
FAILURE_LOG = "failure.log"
GRACE_SECONDS = 1.0  # for the other ranks to say what went wrong first


class JobFailed(RuntimeError):
    """A rank failed; the message is one line that names it."""


def launch_module(module: str, folder: Path, *, num_processes: int, logs: Path) -> None:
    """``python -m module folder`` as each of ``num_processes`` local ranks; wait for them.

    The first rank keeps the terminal; the others write to ``logs``. The module's last line calls
    :func:`dcp.train.process.main`.

    Raises:
        ValueError: more processes than this machine can start, or fewer than one.
        JobFailed: a rank failed; the rest were ended.
    """
    _check_count(num_processes)
    logs.mkdir(parents=True, exist_ok=True)
    (logs / FAILURE_LOG).unlink(missing_ok=True)
    processes: list[subprocess.Popen] = []
    with _listener() as listener:
        try:
            for rank in range(num_processes):
                command = [sys.executable, "-m", module, str(folder)]
                processes.append(_start(rank, num_processes, command, listener, logs))
            listener.close()  # the first rank has it now
            _watch(processes, folder, logs)
        except BlockingIOError as error:
            raise ValueError(
                f"--num-processes {num_processes}: only {len(processes)} could start ({error})"
            ) from None
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


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


def _listener() -> socket.socket:
    """A listening socket that the first rank inherits as the store's: no port can be lost."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.set_inheritable(True)
    return listener


def _start(
    rank: int, num_processes: int, command: list[str], listener: socket.socket, logs: Path
) -> subprocess.Popen:
    host, port = listener.getsockname()
    home = str(Path(__file__).resolve().parents[2])
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")])),
    }
    log = None if rank == 0 else open(logs / f"rank-{rank}.log", "wb")  # noqa: SIM115
    try:
        return subprocess.Popen(
            command + ([str(listener.fileno())] if rank == 0 else []),
            stdin=subprocess.PIPE,  # ends with this process, which tells the rank to end, too
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()] if rank == 0 else [],
            env=os.environ | {name: str(value) for name, value in variables.items()},
        )
    finally:
        if log is not None:
            log.close()


def _watch(processes: list[subprocess.Popen], folder: Path, logs: Path) -> None:
    """Wait until all ranks succeed; :class:`JobFailed` for the one that failed first."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(GRACE_SECONDS)
            break
        time.sleep(0.05)
    if not any(process.poll() for process in processes):
        return
    for rank, process in enumerate(processes):
        if process.poll() is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            hint = ", maybe for want of memory" if name == "SIGKILL" else ""
            raise JobFailed(f"rank {rank} was killed by {name}{hint}")
    failures = [json.loads(path.read_text()) for path in folder.glob("failure-*.json")]
    if not failures:
        rank = next(rank for rank, process in enumerate(processes) if process.poll())
        status = processes[rank].returncode
        raise JobFailed(f"rank {rank} ended with status {status}; see {logs}")
    first = min(failures, key=lambda failure: failure["time"])
    where = ""
    if first["traceback"]:
        (logs / FAILURE_LOG).write_text(first["traceback"])
        where = f" (traceback in {logs / FAILURE_LOG})"
    raise JobFailed(f"rank {first['rank']} failed: {first['error']}{where}")
