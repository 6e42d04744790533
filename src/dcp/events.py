"""The clock of the simulator: ranks that compute and flows that share links, event by event.

The compiled functions hand each other plain arrays: in a tuple of arrays, every access costs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

GRAIN = 2e-7  # seconds; events closer than this are handled together


@njit(cache=True)
def play(
    compute: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    step: np.ndarray,
    volume: np.ndarray,
    latency: np.ndarray,
    links: np.ndarray,
    capacity: np.ndarray,
    by_rank: np.ndarray,
    rank_start: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run all ranks' steps. A step begins a communication, computes, and ends when both are over.

    A flow starts, after its latency, once both its ends have begun the step that launches it; a
    link's capacity is shared equally by the flows on it, and a flow goes at its slowest link's
    share.

    Args:
        compute: seconds of every rank's divisions, ``[steps, ranks]``.
        source, target, step, volume, latency: of each flow; it is launched in step ``step``.
        links: the links of each flow, ``[flows, links]``.
        capacity: bytes per second of each link.
        by_rank, rank_start: CSR of the flows that each (step, rank) takes part in.

    Returns:
        When each step began, when its compute ended and when its transfers ended:
        three ``[steps, ranks]``.
    """
    num_steps, num_ranks = compute.shape
    times = np.zeros((3, num_steps, num_ranks))
    begin, computed, arrived = times[0], times[1], times[2]
    at = np.full(num_ranks, -1)  # the step each rank is in
    missing = np.zeros(num_ranks, dtype=np.int64)  # its flows of this step that are not over
    starts, rate, left = np.zeros(len(source)), np.zeros(len(source)), volume.copy()
    pending = np.empty(len(source), dtype=np.int64)  # flows launched, still in their latency
    active = np.empty(len(source), dtype=np.int64)
    num_pending = num_active = 0
    load = np.zeros(len(capacity), dtype=np.int64)  # active flows of each link
    now = 0.0
    while True:
        num_pending = _begin(
            now, compute, at, missing, begin, computed, arrived,
            source, target, latency, by_rank, rank_start, starts, pending, num_pending,
        )  # fmt: skip
        if at.min() == num_steps:
            return begin, computed, arrived
        _share_links(active, num_active, links, capacity, load, rate)
        after = _next_event(
            now, at, computed, starts, pending, num_pending, left, rate, active, num_active
        )
        num_active = _advance(
            now, after, left, rate, active, num_active, links, load,
            source, target, step, missing, arrived,
        )  # fmt: skip
        num_pending, num_active = _start(
            after, starts, pending, num_pending, active, num_active, links, load
        )
        now = after


@njit(cache=True)
def _begin(
    now: float,
    compute: np.ndarray,
    at: np.ndarray,
    missing: np.ndarray,
    begin: np.ndarray,
    computed: np.ndarray,
    arrived: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    latency: np.ndarray,
    by_rank: np.ndarray,
    rank_start: np.ndarray,
    starts: np.ndarray,
    pending: np.ndarray,
    num_pending: int,
) -> int:
    """Begin every step that can begin now; a flow that both its ends have begun is pending."""
    num_steps, num_ranks = compute.shape
    changed = True
    while changed:  # a step without work ends at once
        changed = False
        for r in range(num_ranks):
            t = at[r]
            if t == num_steps or (t >= 0 and (computed[t, r] > now + GRAIN or missing[r] > 0)):
                continue
            changed = True
            at[r] = t = t + 1
            if t == num_steps:
                continue
            begin[t, r] = arrived[t, r] = now
            computed[t, r] = now + compute[t, r]
            first, last = rank_start[t * num_ranks + r], rank_start[t * num_ranks + r + 1]
            missing[r] = last - first
            for i in range(first, last):
                f = by_rank[i]
                if at[source[f]] >= t and at[target[f]] >= t:
                    starts[f] = now + latency[f]
                    pending[num_pending] = f
                    num_pending += 1
    return num_pending


@njit(cache=True)
def _share_links(
    active: np.ndarray,
    num_active: int,
    links: np.ndarray,
    capacity: np.ndarray,
    load: np.ndarray,
    rate: np.ndarray,
) -> None:
    """Each active flow's rate: the least share of its links."""
    for i in range(num_active):
        f = active[i]
        rate[f] = np.inf
        for link in links[f]:
            rate[f] = min(rate[f], capacity[link] / load[link])


@njit(cache=True)
def _next_event(
    now: float,
    at: np.ndarray,
    computed: np.ndarray,
    starts: np.ndarray,
    pending: np.ndarray,
    num_pending: int,
    left: np.ndarray,
    rate: np.ndarray,
    active: np.ndarray,
    num_active: int,
) -> float:
    """The next moment at which a division ends, or a flow starts or ends."""
    after = np.inf
    for r in range(len(at)):
        t = at[r]
        if t < len(computed) and computed[t, r] > now + GRAIN:
            after = min(after, computed[t, r])
    for i in range(num_pending):
        after = min(after, starts[pending[i]])
    for i in range(num_active):
        after = min(after, now + left[active[i]] / rate[active[i]])
    after = max(after, now)
    assert after < np.inf
    return after


@njit(cache=True)
def _advance(
    now: float,
    after: float,
    left: np.ndarray,
    rate: np.ndarray,
    active: np.ndarray,
    num_active: int,
    links: np.ndarray,
    load: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    step: np.ndarray,
    missing: np.ndarray,
    arrived: np.ndarray,
) -> int:
    """Move the active flows on; one that ends leaves its links and is missing no more."""
    kept = 0
    for i in range(num_active):
        f = active[i]
        left[f] -= rate[f] * (after - now)
        if left[f] > rate[f] * GRAIN:
            active[kept] = f
            kept += 1
            continue
        for link in links[f]:
            load[link] -= 1
        for r in (source[f], target[f]):
            missing[r] -= 1
            arrived[step[f], r] = after
    return kept


@njit(cache=True)
def _start(
    after: float,
    starts: np.ndarray,
    pending: np.ndarray,
    num_pending: int,
    active: np.ndarray,
    num_active: int,
    links: np.ndarray,
    load: np.ndarray,
) -> tuple[int, int]:
    """Pending flows whose latency is over become active; how many there are of both then."""
    kept = 0
    for i in range(num_pending):
        f = pending[i]
        if starts[f] > after + GRAIN:
            pending[kept] = f
            kept += 1
            continue
        for link in links[f]:
            load[link] += 1
        active[num_active] = f
        num_active += 1
    return kept, num_active
