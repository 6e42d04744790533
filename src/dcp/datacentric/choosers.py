"""From costs, remaining samples and ranks to an iteration: one pure function per method.

Ranks that call one with equal arguments, the generator's state included, get equal iterations:
nothing has to be said between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dcp.datacentric.config import DataCentricArguments
from dcp.datacentric.costs import Choice, Costs
from dcp.datacentric.draw import draw_choices, share_out
from dcp.datacentric.inter import accumulate
from dcp.datacentric.intra import MIX, retune
from dcp.datacentric.iteration import Iteration, RankGroup
from dcp.datacentric.profile import Profile

Remaining = Mapping[str, int]  # samples by bucket
Chooser = Callable[[Remaining, int, np.random.Generator], Iteration]


def make_chooser(profile: Profile, keys: DataCentricArguments) -> Chooser:
    """The function (remaining, number of ranks, rng) -> iteration that the configuration asks for.

    Without ``auto_grad_accumulation`` it is :func:`choose_intra`, without ``dynamic_sp`` at the one
    degree ``sp_size``.
    """
    degrees = None if keys.dynamic_sp else [keys.sp_size]
    costs = Costs(profile, recompute=not keys.dynamic_recompute, degrees=degrees)
    if not keys.auto_grad_accumulation:
        return lambda left, num_ranks, rng: choose_intra(costs, left, num_ranks, rng)
    caps = Caps(
        max_steps=keys.max_grad_accumulation_steps,
        min_steps=keys.min_grad_accumulation_steps,
        max_micro_batches=keys.max_micro_batches,
    )
    return lambda left, num_ranks, rng: choose_inter(costs, left, num_ranks, rng, caps=caps)


def choose_intra(
    costs: Costs, remaining: Remaining, num_ranks: int, rng: np.random.Generator
) -> Iteration:
    """One micro-batch per group; degrees and batch sizes such that groups end together."""
    drawn, free = draw_choices(costs, remaining, num_ranks, rng)
    buckets = [choice.bucket for choice in drawn]
    tuned = retune(buckets, remaining, num_ranks, costs)
    if tuned is None:
        shared = zip(drawn, share_out(buckets, remaining), strict=True)
        return Iteration.of([costs.group(c, min(c.batch_size, n)) for c, n in shared], idle=free)
    return Iteration.of([costs.group(choice, choice.batch_size) for choice in tuned])


@dataclass(frozen=True)
class Caps:
    """Of accumulation; see :func:`dcp.datacentric.inter.accumulate`. ``max_micro_batches`` is a
    group's."""

    max_steps: int
    min_steps: int
    max_micro_batches: int


def choose_inter(
    costs: Costs, remaining: Remaining, num_ranks: int, rng: np.random.Generator, *, caps: Caps
) -> Iteration:
    """Groups end together by the number of micro-batches.

    They start from every bucket at its best, or from degrees and batch sizes retuned as
    :func:`choose_intra` does, where that does clearly more per second: the first wastes no rank on
    a degree that is too large, the second no time on a long sample when few others are left.
    """
    drawn, free = draw_choices(costs, remaining, num_ranks, rng)
    iteration = Iteration.of(_accumulated(costs, drawn, remaining, caps), idle=free)
    tuned = retune([choice.bucket for choice in drawn], remaining, num_ranks, costs)
    if tuned is not None:
        other = Iteration.of(_accumulated(costs, tuned, remaining, caps))
        better = _rate(costs, iteration) >= MIX * _rate(costs, other)
        return iteration if better else other
    return iteration


def _accumulated(
    costs: Costs, choices: Sequence[Choice], remaining: Remaining, caps: Caps
) -> list[RankGroup]:
    """Groups of these choices, with as many micro-batches as use the ranks best."""
    if not choices:
        return []
    available = share_out([choice.bucket for choice in choices], remaining)
    sizes = [min(c.batch_size, count) for c, count in zip(choices, available, strict=True)]
    batches = [-(-count // size) for count, size in zip(available, sizes, strict=True)]
    steps = accumulate(
        [costs.seconds(c.bucket, c.degree, n) for c, n in zip(choices, sizes, strict=True)],
        [choice.degree for choice in choices],
        [min(count, caps.max_micro_batches) for count in batches],
        max_steps=caps.max_steps,
        min_steps=caps.min_steps,
        sync_seconds=costs.sync_seconds,
    )
    groups = [
        costs.group(replace(choice, batch_size=size), min(step * size, count))
        for choice, step, size, count in zip(choices, steps, sizes, available, strict=True)
    ]
    return _top_up(costs, groups, remaining, caps.max_micro_batches)


def _rate(costs: Costs, iteration: Iteration) -> float:
    """What an iteration does per second: its samples at their worth in ranks' time."""
    batches = [batch for group in iteration.groups for batch in group.micro_batches]
    done = sum(batch.batch_size * costs.sample_rank_seconds(batch.bucket) for batch in batches)
    return done / (float(iteration.rank_seconds().max()) + costs.sync_seconds)


def _top_up(
    costs: Costs, groups: list[RankGroup], remaining: Remaining, max_micro_batches: int
) -> list[RankGroup]:
    """Groups that would wait, because their bucket ran out or does not divide the time, take
    micro-batches of other buckets too: each time the one that does most in the time left."""
    left = dict(sorted(remaining.items()))
    for batch in (batch for group in groups for batch in group.micro_batches):
        left[batch.bucket] -= batch.batch_size
    longest = max(group.seconds for group in groups) * (1 + 1e-9)
    topped = []
    for group in groups:
        while len(group.micro_batches) < max_micro_batches:
            room = longest - group.seconds
            more = [
                Choice(bucket, group.degree, size, costs.seconds(bucket, group.degree, size))
                for bucket, count in left.items()
                if (size := costs.most_within(bucket, group.degree, room, count))
            ]
            if not more:
                break
            best = max(more, key=lambda c: c.batch_size * costs.sample_rank_seconds(c.bucket))
            left[best.bucket] -= best.batch_size
            added = costs.group(best, best.batch_size).micro_batches
            group = RankGroup(group.degree, group.micro_batches + added)
        topped.append(group)
    return topped
