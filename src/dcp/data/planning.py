"""Planning ahead: a pool of worker processes that outlives the death of any of them."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, cast

from dcp.data.messages import answer_from_bytes, read_message, write_message
from dcp.data.worker import answer_or_refusal

_COMMAND = [sys.executable, "-m", "dcp.data.worker"]
ATTEMPTS = 3  # a batch that kills this many workers is given up


class PlanningError(RuntimeError):
    """Planning workers died on a batch, again and again."""


class PlanningPool:
    """Plans requests in worker processes, in any order; each result is a ``Future``.

    A worker that dies is replaced and its request planned again, with one warning per death.
    ``num_workers=0`` plans in this process, when the result is asked for.
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        self._requests: queue.SimpleQueue[tuple[bytes, Future] | None] = queue.SimpleQueue()
        self._workers = [_Worker(self._requests) for _ in range(num_workers)]
        # also at garbage collection and at exit
        self._finalizer = weakref.finalize(self, _stop_all, self._workers, self._requests)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, request: bytes) -> Future[list[bytes]]:
        """Plan a request message; the result is every rank's ``RankPlan`` as bytes."""
        if not self._workers:
            return _Inline(request)
        future: Future[list[bytes]] = Future()
        self._requests.put((request, future))
        return future

    def close(self) -> None:
        """End the workers; what was not planned stays unanswered."""
        self._finalizer()


def _stop_all(workers: list[_Worker], requests: queue.SimpleQueue) -> None:
    for worker in workers:
        worker.stop()
    for _ in workers:
        requests.put(None)


class _Inline(Future):
    """A request that is planned when its result is asked for."""

    def __init__(self, request: bytes) -> None:
        super().__init__()
        self._request = request

    def result(self, timeout: float | None = None) -> list[bytes]:
        if not self.done():
            try:
                self.set_result(answer_from_bytes(answer_or_refusal(self._request)))
            except ValueError as error:
                self.set_exception(error)
        return super().result()


class _Worker:
    """A worker process and the thread that feeds it."""

    def __init__(self, requests: queue.SimpleQueue) -> None:
        self._requests, self._stopping = requests, False
        self.process = _start_process()
        threading.Thread(target=self._serve, name="dcp-planning", daemon=True).start()

    def stop(self) -> None:
        self._stopping = True
        self.process.kill()

    def _serve(self) -> None:
        while (job := self._requests.get()) is not None and not self._stopping:
            request, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(answer_from_bytes(self._ask(request)))
                except Exception as error:  # whoever waits for the plan must hear of it
                    future.set_exception(error)
        self.process.kill()
        self.process.communicate()

    def _ask(self, request: bytes) -> bytes:
        """The worker's answer, or its successors'."""
        for _ in range(ATTEMPTS):
            try:
                write_message(cast(BinaryIO, self.process.stdin), request)
                answer = read_message(cast(BinaryIO, self.process.stdout))
            except OSError:  # the pipe broke
                answer = None
            if answer is not None:
                return answer
            if self._stopping:
                raise PlanningError("the planning pool was closed")
            self._replace()
        raise PlanningError(f"{ATTEMPTS} planning workers died on one batch")

    def _replace(self) -> None:
        dead = self.process
        dead.kill()
        dead.communicate()
        self.process = _start_process()
        if self._stopping:  # stop() may have killed the old one
            self.process.kill()
        warnings.warn(
            f"a planning worker (pid {dead.pid}) died with exit status {dead.returncode}; "
            "a new one plans its batch again",
            RuntimeWarning,
            stacklevel=2,
        )


def _start_process() -> subprocess.Popen:
    """A worker that finds the same dcp as this process, wherever it was imported from."""
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
