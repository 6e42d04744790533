"""What a benchmark started ends with it, also where it is told to end from outside."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int]


def ending_on_sigterm(run: Run) -> Run:
    """``run``, which SIGTERM ends as Ctrl-C does: it cleans up on its way out."""

    def unwinding(args: argparse.Namespace) -> int:
        if threading.current_thread() is not threading.main_thread():
            return run(args)  # signals are not this thread's
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return run(args)
        finally:
            signal.signal(signal.SIGTERM, before)

    return unwinding
