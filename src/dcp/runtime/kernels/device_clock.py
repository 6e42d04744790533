"""Seconds of works on a CUDA device, between its events.

Before each turn the device sleeps, so that the host has queued the whole turn when it begins: what
it costs to launch is in none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

SLEEP_CYCLES = 20_000_000  # about 10 ms
Works = dict[str, Callable[[], Any]]


def device_medians(works: Works, repeat: int) -> dict[str, float]:
    """Median seconds of each work on the device; they take turns. A work that cannot run, as a
    rival with settings that the device refuses, is left out; ours must run."""
    for name, work in list(works.items()):
        try:
            for _ in range(2):  # compiles, warms up
                work()
            torch.cuda.synchronize()
        except Exception:
            if name == "ours" or len(works) <= 2:
                raise
            works = {other: works[other] for other in works if other != name}
    begun: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in works}
    for _ in range(repeat):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, work in works.items():
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            work()
            events[1].record()
            begun[name].append(events)
        torch.cuda.synchronize()
    return {n: median(a.elapsed_time(b) for a, b in each) / 1e3 for n, each in begun.items()}
