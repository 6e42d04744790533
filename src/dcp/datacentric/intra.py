"""Intra-iteration balance: a degree and a batch size for every group, so that all end together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dcp.datacentric.costs import Choice, Costs
from dcp.datacentric.draw import share_out

MOST_LENGTHS = 2048  # of an iteration that are tried; beyond that, evenly spread ones
MIX = 0.95  # share of the best rate at which the choice with more groups is preferred


def retune(
    drawn: Sequence[str], remaining: Mapping[str, int], num_ranks: int, costs: Costs
) -> list[Choice] | None:
    """Choices for the first groups drawn, that exactly fill the ranks and do most per second.

    Iterations are to mix buckets as they were drawn: as many groups are kept as come within
    :data:`MIX` of the best rate. A sample is worth the ranks' time that it takes at its bucket's
    best choice, so that neither waiting nor a degree larger than useful pays. Exact: for every
    possible length of the iteration, every group takes as many samples as fit at each degree, and a
    knapsack over ranks picks the degrees. None where no choice of degrees fills the ranks.

    Args:
        drawn: bucket of each group, in the order in which they are drawn.
        remaining: samples of each bucket that are left; equal groups share them equally.
    """
    if not drawn:
        return None
    share = share_out(list(drawn), remaining)
    lengths = _lengths(drawn, share, costs)
    value = np.full((len(lengths), num_ranks + 1), -np.inf)  # of the groups so far, by ranks used
    value[:, 0] = 0.0
    found: list[tuple[float, int]] = []  # best rate with so many groups, and its length
    taken: list[tuple[np.ndarray, dict[int, np.ndarray]]] = []
    for bucket, most in zip(drawn, share, strict=True):
        value, degree, counts = _add(value, bucket, most, lengths, costs)
        taken.append((degree, counts))
        rate = value[:, num_ranks] / (lengths + costs.sync_seconds)
        found.append((float(rate.max()), int(rate.argmax())))
    best = max((rate for rate, _ in found), default=0.0)
    if best <= 0:
        return None
    num_groups = max(n for n, (rate, _) in enumerate(found, start=1) if rate >= MIX * best)
    at = found[num_groups - 1][1]
    chosen, used = [], num_ranks
    for bucket, (degree, counts) in zip(
        drawn[:num_groups][::-1], taken[:num_groups][::-1], strict=True
    ):
        d = int(degree[at, used])
        n = int(counts[d][at])
        chosen.append(Choice(bucket, d, n, costs.seconds(bucket, d, n)))
        used -= d
    return chosen[::-1]


def _lengths(drawn: Sequence[str], share: Sequence[int], costs: Costs) -> np.ndarray:
    """Lengths of the iteration worth trying: those of any micro-batch that may occur, ascending."""
    most: dict[str, int] = {}
    for bucket, count in zip(drawn, share, strict=True):
        most[bucket] = max(most.get(bucket, 0), count)
    every = [
        costs.seconds_by_size(bucket, degree)[:count]
        for bucket, count in most.items()
        for degree in costs.degrees(bucket)
    ]
    lengths = np.unique(np.concatenate(every))
    if len(lengths) > MOST_LENGTHS:
        lengths = lengths[np.linspace(0, len(lengths) - 1, MOST_LENGTHS).round().astype(int)]
    return lengths


def _add(
    value: np.ndarray, bucket: str, most: int, lengths: np.ndarray, costs: Costs
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """One more group: best values, the degree that gave each, and samples by degree and length."""
    new = np.full_like(value, -np.inf)
    chosen = np.zeros(value.shape, dtype=np.int64)
    counts = {}
    worth = costs.sample_rank_seconds(bucket)
    for degree in costs.degrees(bucket):
        if degree >= value.shape[1]:
            continue
        times = costs.seconds_by_size(bucket, degree)[:most]
        counts[degree] = _most_within(times, lengths)
        gain = np.where(counts[degree] > 0, counts[degree] * worth, -np.inf)
        offered = value[:, : value.shape[1] - degree] + gain[:, None]
        better = offered > new[:, degree:]
        new[:, degree:] = np.where(better, offered, new[:, degree:])
        chosen[:, degree:] = np.where(better, degree, chosen[:, degree:])
    return new, chosen, counts


def _most_within(times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Largest batch size whose seconds are within each length; 0 where none is."""
    if not len(times):
        return np.zeros(len(lengths), dtype=np.int64)
    # seconds may fall with the batch size where they are noisy: the least from each size on
    least = np.minimum.accumulate(times[::-1])[::-1]
    return np.searchsorted(least, lengths * (1 + 1e-12), side="right")
