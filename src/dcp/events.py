"""The clock of the simulator: ranks that compute and flows that share links, event by event."""

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
    begin = np.zeros((num_steps, num_ranks))
    computed = np.zeros((num_steps, num_ranks))
    arrived = np.zeros((num_steps, num_ranks))
    at = np.full(num_ranks, -1)  # the step each rank is in
    missing = np.zeros(num_ranks, dtype=np.int64)  # its flows of this step that are not over
    num_flows = len(source)
    starts = np.zeros(num_flows)
    left = volume.copy()
    rate = np.zeros(num_flows)
    pending = np.empty(num_flows, dtype=np.int64)  # launched, still in their latency
    active = np.empty(num_flows, dtype=np.int64)
    num_pending = num_active = 0
    load = np.zeros(len(capacity), dtype=np.int64)
    now = 0.0
    finished = 0
    while True:
        # begin every step that can begin now
        changed = True
        while changed:
            changed = False
            for r in range(num_ranks):
                t = at[r]
                if t == num_steps:
                    continue
                if t >= 0 and (computed[t, r] > now + GRAIN or missing[r] > 0):
                    continue
                changed = True
                at[r] = t = t + 1
                if t == num_steps:
                    finished += 1
                    continue
                begin[t, r] = now
                computed[t, r] = now + compute[t, r]
                arrived[t, r] = now
                first, last = rank_start[t * num_ranks + r], rank_start[t * num_ranks + r + 1]
                missing[r] = last - first
                for i in range(first, last):
                    f = by_rank[i]
                    peer = target[f] if source[f] == r else source[f]
                    if at[peer] >= t:
                        starts[f] = now + latency[f]
                        pending[num_pending] = f
                        num_pending += 1
        if finished == num_ranks:
            return begin, computed, arrived

        # share the links
        for i in range(num_active):
            f = active[i]
            rate[f] = np.inf
            for link in links[f]:
                rate[f] = min(rate[f], capacity[link] / load[link])

        # the next moment at which something happens
        after = np.inf
        for r in range(num_ranks):
            t = at[r]
            if t < num_steps and computed[t, r] > now + GRAIN:
                after = min(after, computed[t, r])
        for i in range(num_pending):
            after = min(after, starts[pending[i]])
        for i in range(num_active):
            after = min(after, now + left[active[i]] / rate[active[i]])
        after = max(after, now)
        assert after < np.inf

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
        num_active = kept
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
        num_pending = kept
        now = after
