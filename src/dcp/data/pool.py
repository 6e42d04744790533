"""Where plans are made: a pool of worker processes that outlives the death of any of them."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import Future
from typing import BinaryIO, Protocol, cast

from dcp.data.messages import (
    PlanningError,
    PoolLost,
    answer_from_bytes,
    read_message,
    write_message,
)
from dcp.data.ray_pool import RayPool
from dcp.data.worker import ATTEMPTS, answer_or_refusal
from dcp.launch.environment import child_environment

END_SECONDS = 5.0  # for the threads to see that their workers are gone
SLOWER, LEAST_SECONDS, FIRST_SECONDS = 20.0, 30.0, 90.0
_COMMAND = [sys.executable, "-m", "dcp.data.worker"]


class Pool(Protocol):
    """Something that plans requests (:mod:`dcp.data.messages`), in any order."""

    def submit(self, request: bytes) -> Future[list[bytes]]:
        """Plan a request; the result is every rank's ``RankPlan`` as bytes.

        The future fails with the planner's ``PlanningFailed``, or with :class:`PoolLost`.
        """

    def close(self) -> None:
        """End the pool; what is not planned by then fails."""


def open_pool(
    backend: str | Pool, *, num_workers: int, worker_timeout_seconds: float | None = None
) -> Pool:
    """A pool by the name of its backend, or the given pool itself."""
    if worker_timeout_seconds is not None and not worker_timeout_seconds > 0:
        raise ValueError(
            f"worker_timeout_seconds must be positive, or None, got {worker_timeout_seconds}"
        )
    if backend == "processes":
        return PlanningPool(num_workers, worker_timeout_seconds=worker_timeout_seconds)
    if backend == "ray":
        return RayPool()
    if isinstance(backend, str) or not (hasattr(backend, "submit") and hasattr(backend, "close")):
        raise ValueError(
            f"planning_pool must be 'processes', 'ray' or an object with submit and close, "
            f"got {backend!r}"
        )
    return backend


class PlanningPool:
    """Plans in worker processes of this machine.

    A worker that dies is replaced and its batch planned again, with one warning. So is one that
    hangs: that takes longer for a batch than ``worker_timeout_seconds``. By default it has
    ``SLOWER`` times as long as the slowest batch so far took, not less than ``LEAST_SECONDS`` (or
    ``FIRST_SECONDS`` where none was planned yet), and each worker twice as long as the one before.
    When ``ATTEMPTS`` workers in a row die on one batch, or none can be started, the pool is lost.
    ``num_workers=0`` plans in this process, when the result is asked for.
    """

    def __init__(self, num_workers: int, *, worker_timeout_seconds: float | None = None) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        self._jobs = _Jobs(worker_timeout_seconds)
        # also at garbage collection and at exit
        closed = PlanningError("the planning pool was closed")
        self._finalizer = weakref.finalize(self, self._jobs.end, closed)
        self._jobs.workers = [_Worker(self._jobs) for _ in range(num_workers)]

    def submit(self, request: bytes) -> Future[list[bytes]]:
        """See :class:`Pool`."""
        if not self._jobs.workers:
            return _Inline(request)
        future: Future[list[bytes]] = Future()
        self._jobs.put(request, future)
        return future

    def close(self) -> None:
        """See :class:`Pool`."""
        self._finalizer()


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


class _Jobs:
    """The requests that wait, the workers that serve them, and why it all ended, once it has."""

    def __init__(self, timeout_seconds: float | None) -> None:
        self._timeout, self._slowest = timeout_seconds, 0.0
        self.waiting: queue.SimpleQueue[tuple[bytes, Future] | None] = queue.SimpleQueue()
        self.workers: list[_Worker] = []
        self.ended: PlanningError | None = None
        self._lock = threading.Lock()

    def put(self, request: bytes, future: Future) -> None:
        with self._lock:  # nothing may enter the queue behind the workers' last word
            if self.ended is None:
                self.waiting.put((request, future))
                return
        future.set_exception(self.ended)

    def patience(self, deaths: int) -> float:
        """Seconds for a batch of which so many workers died."""
        if self._timeout is not None:
            return self._timeout
        enough = SLOWER * self._slowest
        least = LEAST_SECONDS if self._slowest else FIRST_SECONDS
        return max(enough, least) * 2.0**deaths

    def took(self, seconds: float) -> None:
        """A batch was planned."""
        self._slowest = max(self._slowest, seconds)

    def end(self, error: PlanningError) -> None:
        """End the workers; what waits, or comes yet, fails with the first ``error``."""
        with self._lock:
            if self.ended is not None:
                return
            self.ended = error
            for _ in self.workers:
                self.waiting.put(None)
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:  # a thread that the interpreter ends in torch's code aborts it
            if worker.thread is not threading.current_thread():
                worker.thread.join(END_SECONDS)


class _Worker:
    """A worker process and the thread that feeds it."""

    def __init__(self, jobs: _Jobs) -> None:
        self._jobs = jobs
        self.process = _start_process()
        self.thread = threading.Thread(target=self._serve, name="dcp-planning", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while (job := self._jobs.waiting.get()) is not None:
            request, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(answer_from_bytes(self._ask(request)))
            except Exception as error:  # whoever waits for the plan must hear of it
                if isinstance(error, PoolLost):
                    self._jobs.end(error)
                future.set_exception(error)
        self._bury()

    def _ask(self, request: bytes) -> bytes:
        """The worker's answer, or its successors'."""
        deaths: list[str] = []
        while len(deaths) < ATTEMPTS:
            if self._jobs.ended is not None:
                raise self._jobs.ended
            began, patience = time.monotonic(), self._jobs.patience(len(deaths))
            answer = self._exchange(request, patience)
            seconds = time.monotonic() - began
            if answer is not None:
                self._jobs.took(seconds)
                if deaths:
                    _warn(deaths)
                return answer
            if self._jobs.ended is None:
                hung = f"no plan within {patience:g} s, " if seconds > patience else ""
                deaths.append(hung + self._replace())
        raise PoolLost(f"{ATTEMPTS} planning workers in a row died on a batch: {deaths[-1]}")

    def _exchange(self, request: bytes, patience: float) -> bytes | None:
        """The answer of this very process; None if it dies, as it does after ``patience``."""
        timer = threading.Timer(patience, self.process.kill)  # ends reading and writing, too
        timer.daemon = True
        timer.start()
        try:
            write_message(cast(BinaryIO, self.process.stdin), request)
            return read_message(cast(BinaryIO, self.process.stdout))
        except OSError:  # the pipe broke
            return None
        finally:
            timer.cancel()

    def _replace(self) -> str:
        """Start a new process; says how the old one ended."""
        self._bury()
        dead = f"pid {self.process.pid}, exit status {self.process.returncode}"
        try:
            self.process = _start_process()
        except OSError as error:
            raise PoolLost(
                f"a planning worker died ({dead}) and no other starts: {error}"
            ) from None
        if self._jobs.ended is not None:  # end() may have killed the old one
            self.process.kill()
        return dead

    def _bury(self) -> None:
        self.process.kill()
        self.process.communicate()


def _warn(deaths: list[str]) -> None:
    warnings.warn(
        f"a planning worker died ({'; '.join(deaths)}); a new one planned its batch again",
        RuntimeWarning,
        stacklevel=2,
    )


def _start_process() -> subprocess.Popen:
    return subprocess.Popen(
        _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment()
    )
