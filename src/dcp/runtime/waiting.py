"""Waits that end: torch's own never do where the process at the other end stands still.

A stopped process (or a machine that hangs, or is unplugged) keeps its connections, so that a call
of its key-value store never returns, whatever time-out it was given. Nor does Python hear of Ctrl-C
inside such a call. Here another thread makes the call, and the caller waits for that thread.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist

from dcp.errors import DCPError

Result = TypeVar("Result")
_Task = tuple[Future, Callable[..., Any], tuple]

LONGEST_PAUSE_SECONDS = 0.05  # between two looks at a key that is waited for


class NoAnswer(DCPError):
    """A call did not return in its time."""


class Caller:
    """A thread that makes one call after another, of which none is waited for longer than told."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._is_stuck = False
        Thread(target=_serve, args=(self._tasks,), name="dcp-calls", daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    def call(self, seconds: float, function: Callable[..., Result], *args: Any) -> Result:
        """What the function returns or raises; :class:`NoAnswer` if it does neither in ``seconds``,
        and from then on at once."""
        future: Future[Result] = Future()
        if not self._is_stuck:
            self._tasks.put((future, function, args))
            try:
                return future.result(seconds)
            except TimeoutError:
                if future.done():  # the function's own
                    raise
        self._is_stuck = True
        raise NoAnswer(f"no answer within {seconds:g} s")


def _serve(tasks: SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        future, function, args = task
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        del task, future, function, args


def within(seconds: float, function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)``, in another thread; :class:`NoAnswer` if it takes longer."""
    return Caller().call(seconds, function, *args)


class PatientStore:
    """A connection of its own to a store of torch.distributed, under a prefix.

    It has the store's methods (``set``, ``get``, ``add``, ``check``, ``multi_get``, …). Each raises
    :class:`NoAnswer` after ``timeout_seconds`` without an answer, and at once from then on.
    """

    def __init__(self, prefix: str, store: Any, *, timeout_seconds: float) -> None:
        self._timeout, self._caller = timeout_seconds, Caller()
        self._store = dist.PrefixStore(prefix, self._call(store.clone))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)
        return lambda *args: self._call(method, *args)

    def enter(self, prefix: str) -> None:
        """Put one more prefix before all keys."""
        self._store = dist.PrefixStore(prefix, self._store)

    def wait_for(self, keys: Iterable[str], seconds: float) -> bool:
        """Wait until all keys are there; False if they are not in that time."""
        names, began = list(keys), time.monotonic()
        while not self.check(names):
            waited = time.monotonic() - began
            if waited > seconds:
                return False
            time.sleep(min(waited / 8 + 1e-4, LONGEST_PAUSE_SECONDS))
        return True

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._caller.call(self._timeout, function, *args)
        except NoAnswer as error:
            raise NoAnswer(
                f"rank 0, or what else keeps the job's store, died or stands still ({error})"
            ) from None
