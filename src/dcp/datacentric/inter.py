"""Inter-group balance: every group accumulates as many micro-batches as time allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accumulate(
    seconds: Sequence[float],
    degrees: Sequence[int],
    most: Sequence[int],
    *,
    max_steps: int,
    min_steps: int = 1,
    sync_seconds: float = 0.0,
) -> list[int]:
    """Micro-batches of each group that use the ranks' time best.

    Least ``(iteration seconds + sync_seconds) / busy rank-seconds``; without ``sync_seconds`` that
    is least imbalance. Exact: for every possible length of the iteration each group takes as many
    micro-batches as fit. Of equals the shortest iteration is taken.

    Args:
        seconds: of one micro-batch of each group.
        degrees: ranks of each group.
        most: largest count of each group: its samples and the cap on counts.
        max_steps: no group takes longer than so many micro-batches of the slowest.
        min_steps: the group with most micro-batches has at least that many, where ``most`` and
            ``max_steps`` allow it.
    """
    time, ranks, limit = np.asarray(seconds, float), np.asarray(degrees), np.asarray(most)
    cap = time.max() * max_steps * (1 + 1e-12)
    limit = np.minimum(limit, np.maximum((cap / time).astype(int), 1))
    ends = np.concatenate([t * np.arange(1, n + 1) for t, n in zip(time, limit, strict=True)])
    ends = np.unique(ends[ends >= time.max()])
    counts = np.minimum((ends[:, None] * (1 + 1e-12) / time).astype(int), limit)
    length = (counts * time).max(axis=1)
    busy = (counts * time * ranks).sum(axis=1)
    reached = counts.max(axis=1) >= min(min_steps, int(limit.max()))
    price = np.where(reached, (length + sync_seconds) / busy, np.inf)
    best = int(np.flatnonzero(price <= price.min() * (1 + 1e-12))[0])
    return counts[best].tolist()
