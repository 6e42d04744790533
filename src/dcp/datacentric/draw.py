"""Which buckets an iteration starts from: drawn at random, each as often as its work asks for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dcp.datacentric.costs import Choice, Costs


def draw_choices(
    costs: Costs, remaining: Mapping[str, int], num_ranks: int, rng: np.random.Generator
) -> tuple[list[Choice], int]:
    """Choices that fill the ranks, and how many ranks nothing fits on.

    A bucket is drawn in proportion to the time that its remaining samples take, so that all buckets
    last about as long. It comes with its best choice, or the best that the free ranks allow.
    """
    left = {bucket: count for bucket, count in sorted(remaining.items()) if count > 0}
    drawn: list[Choice] = []
    free = num_ranks
    while free:
        fitting = {b: c for b in left if (c := costs.best(b, max_degree=free)) is not None}
        if not fitting:
            break
        names = list(fitting)
        work = np.array([left[b] * fitting[b].seconds / fitting[b].batch_size for b in names])
        choice = fitting[names[int(rng.choice(len(names), p=work / work.sum()))]]
        drawn.append(choice)
        free -= choice.degree
        left[choice.bucket] -= choice.batch_size
        left = {bucket: count for bucket, count in left.items() if count > 0}
    return drawn, free


def split_evenly(count: int, parts: int) -> list[int]:
    """``count`` in ``parts`` nearly equal pieces, the larger ones first."""
    whole, more = divmod(count, parts)
    return [whole + (part < more) for part in range(parts)]


def share_out(choices: list[str], remaining: Mapping[str, int]) -> list[int]:
    """Samples that each of the groups may use, given their buckets: equal parts of what is left."""
    parts = {b: split_evenly(remaining[b], choices.count(b)) for b in sorted(set(choices))}
    return [parts[bucket].pop(0) for bucket in choices]
