"""A process that is told to end from outside does: with what it started, and though it waits."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Argument = TypeVar("Argument")
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, _: object) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one must not stop the cleaning up
    sys.exit(128 + number)


def ending_on_sigterm(run: Callable[[Argument], int]) -> Callable[[Argument], int]:
    """``run``, which SIGTERM ends as Ctrl-C does: it cleans up on its way out."""

    def unwinding(args: Argument) -> int:
        if threading.current_thread() is not threading.main_thread():
            return run(args)  # signals are not this thread's
        before = {number: signal.signal(number, _leave) for number in _SIGNALS}
        try:
            return run(args)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return unwinding


@contextmanager
def leaving_on_interrupt(seconds: float) -> Iterator[None]:
    """SIGINT inside ends the process ``seconds`` later, if the block has not been left by then.

    Python raises ``KeyboardInterrupt`` only between two steps of its main thread, which may be
    waiting in torch for other ranks. Another thread hears of the signal at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not this thread's
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    left = threading.Event()

    def watch() -> None:
        while (signals := os.read(reads, 1)) not in (b"", b"\0"):
            if signals[0] == signal.SIGINT:
                if not left.wait(seconds):
                    os._exit(128 + signal.SIGINT)
                break
        os.close(reads)

    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="dcp-interrupt", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        os.close(writes)
