"""One rank: ``python -m dcp.launch.rank FOLDER``, started by :func:`dcp.launch.ranks.run_ranks`.

The folder holds the task; the rank adds what its work returned.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from dcp.launch.failures import record

TASK, RESULT = "task.json", "result-{}.json"
ENTERED = "entered"
WATCH_SECONDS = 0.25


def main(folder: Path, *, entered: bool) -> int:
    """Do the task's work; the exit status."""
    task, rank = json.loads((folder / TASK).read_text()), int(os.environ["RANK"])
    if task["enter"] and not entered:
        words = [*task["enter"][rank], *_command(folder), ENTERED]
        os.execvp(words[0], words)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher to handle
    threading.Thread(target=_watch, args=(task, folder), daemon=True).start()
    _redirect(rank, task["logs"])
    per_node = task["ranks_per_node"]
    os.environ |= {"LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node)}
    try:
        module, _, function = task["work"].partition(":")
        found: Any = getattr(import_module(module), function)(task["job"])
        (folder / RESULT.format(rank)).write_text(json.dumps(found))
    except Exception as error:
        record(error)
        return 1
    return 0


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "dcp.launch.rank", str(folder)]


def _watch(task: dict[str, Any], folder: Path) -> None:
    """End with the launcher, however it ends: it is the parent, and keeps the folder."""
    limit, started = task["timeout_seconds"], time.monotonic()
    while os.getppid() == task["launcher"] and folder.exists():
        if limit and time.monotonic() - started > limit:
            record(TimeoutError(f"it took longer than {limit:g} s"))
            break
        time.sleep(WATCH_SECONDS)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # the launcher was killed, and left it
    os._exit(1)


def _redirect(rank: int, logs: str | None) -> None:
    """The first rank keeps the terminal; see :func:`dcp.launch.ranks.run_ranks` for the others."""
    if rank == 0:
        return
    path = os.devnull if logs is None else f"{logs}/rank-{rank}.log"
    with open(path, "wb") as file:
        for stream in (1,) if logs is None else (1, 2):
            os.dup2(file.fileno(), stream)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), entered=sys.argv[2:] == [ENTERED]))
