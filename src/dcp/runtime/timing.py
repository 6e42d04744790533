"""When a pass did what: moments that cost a call of a clock, read when they are over.

On a GPU a moment is an event on the current stream, so that nothing waits for the device; elsewhere
it is the host's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch

from dcp.rates import PassFigures

Moment = Any  # seconds of the host's clock, or a CUDA event


def moment(device: torch.device) -> Moment:
    """Now, as the device will come to it."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def has_passed(when: Moment) -> bool:
    """Whether the device has come to it."""
    return isinstance(when, float) or bool(when.query())


def seconds_between(begin: Moment, end: Moment) -> float:
    """Between two moments that have passed."""
    if isinstance(begin, float):
        return float(end - begin)
    return float(begin.elapsed_time(end)) / 1e3


@dataclass(eq=False)
class PassTimes:
    """The moments of one pass of one rank.

    Attributes:
        fingerprint, mask, backward: of the plan's work, see :attr:`dcp.RankPlan.fingerprint`.
        began, ended: of the whole pass.
        attention, packing: (begin, end) of every division, and of every message's packing.
        transfers: by step of the schedule: when it was launched, when the rank came to wait for it,
            and when it had arrived.
    """

    fingerprint: int
    mask: str
    backward: bool
    began: Moment
    ended: Moment = None
    attention: list[tuple[Moment, Moment]] = field(default_factory=list)
    packing: list[tuple[Moment, Moment]] = field(default_factory=list)
    transfers: list[tuple[int, Moment, Moment, Moment]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the device has come to its end."""
        return self.ended is not None and has_passed(self.ended)


def figures_of_passes(passes: list[PassTimes]) -> list[PassFigures]:
    """Figures by kind, of passes that are over, in the order in which they ran."""
    kinds: dict[tuple[int, str, bool], list[PassTimes]] = {}
    between: dict[tuple[int, str, bool], list[float]] = {}
    for each in passes:
        kinds.setdefault(_kind(each), []).append(each)
    for one, other in pairwise(passes):  # with another in between, it is not a layer's time
        if (one.fingerprint, one.backward) == (other.fingerprint, other.backward):
            seconds = seconds_between(one.ended, other.began)
            between.setdefault(_kind(other), []).append(seconds)
    return [_figures(of, between.get(kind, [])) for kind, of in kinds.items()]


def _kind(times: PassTimes) -> tuple[int, str, bool]:
    return times.fingerprint, times.mask, times.backward


def _figures(passes: list[PassTimes], between: list[float]) -> PassFigures:
    first = passes[0]

    def total(spans: list[tuple[Moment, Moment]]) -> float:
        return sum(seconds_between(*span) for span in spans)

    steps = [
        [(step, seconds_between(launched, arrived), seconds_between(came, arrived))
         for step, launched, came, arrived in each.transfers]
        for each in passes
    ]  # fmt: skip
    return PassFigures(
        fingerprint=first.fingerprint,
        mask=first.mask,
        backward=first.backward,
        num_passes=len(passes),
        seconds=float(np.median([seconds_between(p.began, p.ended) for p in passes])),
        attention_seconds=float(np.median([total(p.attention) for p in passes])),
        packing_seconds=float(np.median([total(p.packing) for p in passes])),
        between_seconds=float(np.median(between)) if between else None,
        transfers=tuple(
            (step, seconds, waited)
            for step, seconds, waited in np.median(
                np.array(steps).reshape(len(steps), -1, 3), axis=0
            ).tolist()
        ),
    )
