"""From costs, remaining samples and ranks to an iteration: one pure function per method.

Ranks that call one with equal arguments, the generator's state included, get equal plans: nothing
has to be said between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dcp.datacentric.buckets import Bucket
from dcp.datacentric.costs import Choice, Costs
from dcp.datacentric.draw import draw_choices, share_out
from dcp.datacentric.inter import accumulate
from dcp.datacentric.intra import MIX, retune
from dcp.datacentric.iteration import Group, Iteration, MicroBatch
from dcp.datacentric.profile import Profile
from dcp.train.data_centric import DataCentricKeys

Remaining = Mapping[str, int]
Planner = Callable[[Remaining, int, np.random.Generator], Iteration]


def make_planner(profile: Profile, buckets: Sequence[Bucket], keys: DataCentricKeys) -> Planner:
    """The function (remaining, world, rng) -> iteration that the configuration asks for."""
    degrees = None if keys.dynamic_sp else [keys.sp_size]
    costs = Costs(profile, recompute=not keys.dynamic_recompute, degrees=degrees)
    if keys.preset == "packed":
        sizes = {bucket.name: bucket.size for bucket in buckets}
        return lambda left, world, rng: plan_packed(costs, left, world, rng, sizes=sizes)
    if keys.preset == "bucket":
        limits = median_batches(costs)
        return lambda left, world, rng: plan_fixed(costs, left, world, rng, limits=limits)
    if keys.auto_grad_accumulation:
        caps = Caps(
            max_steps=keys.max_grad_accumulation_steps,
            min_steps=keys.min_grad_accumulation_steps,
            max_micro_batches=keys.max_micro_batches,
        )
        return lambda left, world, rng: plan_inter(costs, left, world, rng, caps=caps)
    if keys.dynamic_sp:
        return lambda left, world, rng: plan_intra(costs, left, world, rng)
    return lambda left, world, rng: plan_fixed(costs, left, world, rng)


def plan_intra(
    costs: Costs, remaining: Remaining, world: int, rng: np.random.Generator
) -> Iteration:
    """One micro-batch per group; degrees and batch sizes such that groups end together."""
    drawn, free = draw_choices(costs, remaining, world, rng)
    buckets = [choice.bucket for choice in drawn]
    tuned = retune(buckets, remaining, world, costs)
    if tuned is None:
        shared = zip(drawn, share_out(buckets, remaining), strict=True)
        return _iteration([_group(costs, c, min(c.batch_size, n)) for c, n in shared], free)
    return _iteration([_group(costs, choice, choice.batch_size) for choice in tuned])


@dataclass(frozen=True)
class Caps:
    """Of accumulation; see :func:`dcp.datacentric.inter.accumulate`. ``max_micro_batches`` is a
    group's."""

    max_steps: int
    min_steps: int
    max_micro_batches: int


def plan_inter(
    costs: Costs, remaining: Remaining, world: int, rng: np.random.Generator, *, caps: Caps
) -> Iteration:
    """Groups end together by the number of micro-batches.

    They start from every bucket at its best, or from degrees and batch sizes retuned as
    :func:`plan_intra` does, where that does clearly more per second: the first wastes no rank on a
    degree that is too large, the second no time on a long sample when few others are left.
    """
    drawn, free = draw_choices(costs, remaining, world, rng)
    plan = _iteration(_accumulated(costs, drawn, remaining, caps), free)
    tuned = retune([choice.bucket for choice in drawn], remaining, world, costs)
    if tuned is not None:
        other = _iteration(_accumulated(costs, tuned, remaining, caps))
        plan = plan if _rate(costs, plan) >= MIX * _rate(costs, other) else other
    return plan


def _accumulated(
    costs: Costs, choices: Sequence[Choice], remaining: Remaining, caps: Caps
) -> list[Group]:
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
        _group(costs, replace(choice, batch_size=size), min(step * size, count))
        for choice, step, size, count in zip(choices, steps, sizes, available, strict=True)
    ]
    return _top_up(costs, groups, remaining, caps.max_micro_batches)


def _rate(costs: Costs, iteration: Iteration) -> float:
    """What an iteration does per second: its samples at their worth in ranks' time."""
    batches = [batch for group in iteration.groups for batch in group.micro_batches]
    done = sum(batch.batch_size * costs.sample_rank_seconds(batch.bucket) for batch in batches)
    return done / (float(iteration.rank_seconds().max()) + costs.sync_seconds)


def _top_up(
    costs: Costs, groups: list[Group], remaining: Remaining, max_micro_batches: int
) -> list[Group]:
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
            added = _group(costs, best, best.batch_size).micro_batches
            group = Group(group.degree, group.micro_batches + added)
        topped.append(group)
    return topped


def plan_fixed(
    costs: Costs,
    remaining: Remaining,
    world: int,
    rng: np.random.Generator,
    *,
    limits: Mapping[str, int] | None = None,
) -> Iteration:
    """One micro-batch per group, all groups of the one degree that ``costs`` has.

    ``limits``: most samples by bucket; without it as many as run best.
    """
    left = {bucket: count for bucket, count in sorted(remaining.items()) if count > 0}
    groups: list[Group] = []
    degree = _only_degree(costs)
    while left and (len(groups) + 1) * degree <= world:
        names = list(left)
        best = {b: _within(costs, b, limits[b] if limits else None) for b in names}
        batches = np.array([left[b] / best[b].batch_size for b in names])
        choice = best[names[int(rng.choice(len(names), p=batches / batches.sum()))]]
        size = min(choice.batch_size, left[choice.bucket])
        groups.append(_group(costs, choice, size))
        left[choice.bucket] -= size
        left = {bucket: count for bucket, count in left.items() if count > 0}
    return _iteration(groups, world - len(groups) * degree)


def plan_packed(
    costs: Costs,
    remaining: Remaining,
    world: int,
    rng: np.random.Generator,
    *,
    sizes: Mapping[str, int],
) -> Iteration:
    """Groups of one degree, each filled with samples of any bucket up to the largest's size.

    ``sizes``: elements of a sample, by bucket.
    """
    left = {bucket: count for bucket, count in sorted(remaining.items()) if count > 0}
    degree, budget = _only_degree(costs), max(sizes[bucket] for bucket in costs.buckets)
    groups: list[Group] = []
    while left and (len(groups) + 1) * degree <= world:
        packed: dict[str, int] = {}
        room = budget
        while fitting := {b: n for b, n in left.items() if n > 0 and sizes[b] <= room}:
            counts = np.array(list(fitting.values()), dtype=float)
            bucket = list(fitting)[int(rng.choice(len(fitting), p=counts / counts.sum()))]
            packed[bucket] = packed.get(bucket, 0) + 1
            left[bucket] -= 1
            room -= sizes[bucket]
        left = {bucket: count for bucket, count in left.items() if count > 0}
        batches: list[MicroBatch] = []
        for bucket, count in packed.items():
            most = Choice(bucket, degree, costs.max_batch(bucket, degree), 0.0)
            batches += _group(costs, most, count).micro_batches
        groups.append(Group(degree, tuple(batches)))
    return _iteration(groups, world - len(groups) * degree)


def median_batches(costs: Costs) -> dict[str, int]:
    """Bucket parallel's batch sizes: no bucket takes longer than the median of all at their best,
    or than one sample needs."""
    degree = _only_degree(costs)
    median = float(np.median([_within(costs, b, None).seconds for b in costs.buckets]))
    return {
        b: max(int((costs.seconds_by_size(b, degree) <= median).sum()), 1) for b in costs.buckets
    }


def _only_degree(costs: Costs) -> int:
    degrees = {degree for bucket in costs.buckets for degree in costs.degrees(bucket)}
    assert len(degrees) == 1, f"one degree is wanted, the costs have {sorted(degrees)}"
    return degrees.pop()


def _within(costs: Costs, bucket: str, limit: int | None) -> Choice:
    found = [c for c in costs.choices(bucket) if limit is None or c.batch_size <= limit]
    return min(found, key=lambda choice: (choice.rank_seconds, choice.batch_size))


def _group(costs: Costs, choice: Choice, num_samples: int) -> Group:
    """Full micro-batches, and a smaller last one; each with the time of its own size."""
    whole, rest = divmod(num_samples, choice.batch_size)
    sizes = [choice.batch_size] * whole + [rest] * (rest > 0)
    return Group(
        choice.degree,
        tuple(
            MicroBatch(
                choice.bucket,
                size,
                costs.seconds(choice.bucket, choice.degree, size),
                tuple(costs.keep(choice.bucket, choice.degree, size).items()),
            )
            for size in sizes
        ),
    )


def _iteration(groups: list[Group], idle: int = 0) -> Iteration:
    """Groups by descending degree, so that those of powers of two keep inside nodes; idle last."""
    ordered = sorted(groups, key=lambda group: -group.degree)
    return Iteration((*ordered, *([Group(idle, ())] if idle else [])))
