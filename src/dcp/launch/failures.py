"""What a rank leaves behind when it fails, and which failure came first."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcp.errors import DCPError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

FAILURE_LOG = "failure.log"


class JobFailed(DCPError):
    """A rank failed; the message is one line that names it."""


class RankLost(DCPError):
    """A rank of the job died or cannot be reached any more."""


def record(error: Exception) -> None:
    """Leave the error to whoever started this rank (:func:`run_ranks` or torchrun), if anybody did.

    The file is torch's own (:mod:`torch.distributed.elastic.multiprocessing.errors`) with a time
    of more than whole seconds, and without a traceback where the user is to blame. A rank's first
    error stands: later ones follow from it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or Path(path).exists():
        return
    message = " ".join(str(error).split())
    more: dict[str, Any] = {"timestamp": time.time()}
    if not isinstance(error, ValueError | OSError | DCPError):
        message = f"{type(error).__name__}: {message[:500]}"
        more["py_callstack"] = "".join(traceback.format_exception(error))
    draft = Path(f"{path}.draft")
    draft.write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))
    draft.rename(path)


def keep_traceback(text: str, folder: Path | None = None) -> Path:
    """Write a traceback where it stays: to a folder's log, else to a file of its own."""
    if folder is not None:
        path = folder / FAILURE_LOG
    else:
        handle, name = tempfile.mkstemp(prefix="dcp-failure-", suffix=".log")
        os.close(handle)
        path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def first_failure(failures: Mapping[int, ProcessFailure], logs: Path | None) -> JobFailed:
    """The earliest of all ranks' failures; a traceback goes to a file that it names."""
    rank = min(failures, key=lambda rank: _when(failures[rank]))
    first = failures[rank]
    if not isinstance(first.message, dict):  # it recorded nothing
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            hint = ", maybe for want of memory" if name == "SIGKILL" else ""
            return JobFailed(f"rank {rank} was killed by {name}{hint}")
        where = f"; see {logs}" if logs else ""
        return JobFailed(f"rank {rank} ended with status {first.exitcode}{where}")
    where = ""
    if (trace := first.message["extraInfo"].get("py_callstack")) is not None:
        where = f" (traceback in {keep_traceback(trace, logs)})"
    return JobFailed(f"rank {rank} failed: {first.message['message']}{where}")


def _when(failure: ProcessFailure) -> float:
    """When it failed. Of a death without a record torch keeps the whole second: its end is meant.

    Deaths in one second stay in the order in which they were seen, those that the launcher caused
    in turn behind the first.
    """
    if isinstance(failure.message, dict):
        return failure.message["extraInfo"]["timestamp"]
    return failure.timestamp + 1.0
