"""What data-centric choice is compared with: one sequence-parallel degree for all samples.

``bucket`` gives each bucket as many samples as the median bucket's time allows, ``packed`` fills
every group with samples of any bucket, ``fixed`` takes the batch size that runs best and balances
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import numpy as np

from dcp.datacentric import trainer
from dcp.datacentric.choosers import Chooser, Remaining
from dcp.datacentric.config import DataCentricArguments
from dcp.datacentric.costs import Choice, Costs
from dcp.datacentric.iteration import Iteration, MicroBatch, RankGroup
from dcp.datacentric.profile import Profile
from dcp.jobs import Options, launch, run_job

BASELINES = ("bucket", "packed", "fixed")


def make_baseline(name: str, profile: Profile, sizes: Mapping[str, int], *, degree: int) -> Chooser:
    """The chooser of a baseline at one degree; ``sizes``: elements of a sample, by bucket."""
    assert name in BASELINES, name
    costs = Costs(profile, degrees=[degree])
    if name == "packed":
        return lambda left, ranks, rng: choose_packed(costs, left, ranks, rng, sizes=sizes)
    limits = median_batches(costs) if name == "bucket" else None
    return lambda left, ranks, rng: choose_fixed(costs, left, ranks, rng, limits=limits)


def choose_fixed(
    costs: Costs,
    remaining: Remaining,
    num_ranks: int,
    rng: np.random.Generator,
    *,
    limits: Mapping[str, int] | None = None,
) -> Iteration:
    """One micro-batch per group, all groups of the one degree that ``costs`` has.

    ``limits``: most samples by bucket; without it as many as run best.
    """
    left = {bucket: count for bucket, count in sorted(remaining.items()) if count > 0}
    groups: list[RankGroup] = []
    degree = _only_degree(costs)
    while left and (len(groups) + 1) * degree <= num_ranks:
        names = list(left)
        best = {b: _within(costs, b, limits[b] if limits else None) for b in names}
        batches = np.array([left[b] / best[b].batch_size for b in names])
        choice = best[names[int(rng.choice(len(names), p=batches / batches.sum()))]]
        size = min(choice.batch_size, left[choice.bucket])
        groups.append(costs.group(choice, size))
        left[choice.bucket] -= size
        left = {bucket: count for bucket, count in left.items() if count > 0}
    return Iteration.of(groups, idle=num_ranks - len(groups) * degree)


def choose_packed(
    costs: Costs,
    remaining: Remaining,
    num_ranks: int,
    rng: np.random.Generator,
    *,
    sizes: Mapping[str, int],
) -> Iteration:
    """Groups of one degree, each filled with samples of any bucket up to the largest's size.

    ``sizes``: elements of a sample, by bucket.
    """
    left = {bucket: count for bucket, count in sorted(remaining.items()) if count > 0}
    degree, budget = _only_degree(costs), max(sizes[bucket] for bucket in costs.buckets)
    groups: list[RankGroup] = []
    while left and (len(groups) + 1) * degree <= num_ranks:
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
            batches += costs.group(most, count).micro_batches
        groups.append(RankGroup(degree, tuple(batches)))
    return Iteration.of(groups, idle=num_ranks - len(groups) * degree)


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


# --------------------------------------------------------------------------- real ranks


def launch_baseline(name: str, options: Options, *, num_processes: int) -> None:
    """Train a data-centric job whose iterations are the baseline's, at its ``sp_size``."""
    job = {"baseline": name, **options}
    launch(job, num_processes=num_processes, work="lab.baselines:train")


def bucket_sizes(profile: Profile) -> dict[str, int]:
    """Elements of a sample of each bucket, of a profile that was measured."""
    return {bucket: prod(shape) for bucket, shape in profile.model["buckets"].items()}


def train(job: Options) -> None:
    """The work of a rank that :func:`launch_baseline` started."""
    options = dict(job)
    name = options.pop("baseline")

    def chooser_of(profile: Profile, config: DataCentricArguments) -> Chooser:
        return make_baseline(name, profile, bucket_sizes(profile), degree=config.sp_size)

    run_job(options, partial(trainer.train, chooser_of=chooser_of))
