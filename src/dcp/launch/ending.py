"""What a benchmark started ends with it, also where it is told to end from outside."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int]
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, _: object) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second one must not stop the cleaning up
    sys.exit(128 + number)


def ending_on_sigterm(run: Run) -> Run:
    """``run``, which SIGTERM ends as Ctrl-C does: it cleans up on its way out."""

    def unwinding(args: argparse.Namespace) -> int:
        if threading.current_thread() is not threading.main_thread():
            return run(args)  # signals are not this thread's
        before = {number: signal.signal(number, _leave) for number in _SIGNALS}
        try:
            return run(args)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return unwinding
