"""An epoch: iterations until every sample was used once, the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dcp.datacentric.iteration import Group, Iteration
from dcp.datacentric.planners import Planner


def epoch_iterations(
    planner: Planner, bucket_of: Sequence[str], world: int, *, seed: int, epoch: int
) -> Iterator[Iteration]:
    """Iterations of one epoch, with the samples named. Each sample occurs exactly once.

    Args:
        planner: (remaining by bucket, world, generator) -> iteration.
        bucket_of: the bucket of every sample.
        seed, epoch: of the order; nothing else is random.
    """
    rng = np.random.default_rng([seed, epoch])
    waiting: dict[str, list[int]] = {}
    for sample in rng.permutation(len(bucket_of)).tolist():
        waiting.setdefault(bucket_of[sample], []).append(sample)
    while any(waiting.values()):
        counts = {bucket: len(samples) for bucket, samples in waiting.items()}
        iteration = planner(counts, world, rng)
        assert iteration.world == world, f"{iteration.world} of {world} ranks are planned"
        if not iteration.num_samples:
            raise ValueError(
                f"no bucket of {', '.join(b for b, n in counts.items() if n)} runs on {world} "
                "ranks: none of its degrees is small enough; measure the profile on this world"
            )
        yield Iteration(tuple(_name(group, waiting) for group in iteration.groups))


def _name(group: Group, waiting: dict[str, list[int]]) -> Group:
    """The group with samples taken from those that wait."""
    named = []
    for batch in group.micro_batches:
        queue = waiting[batch.bucket]
        assert len(queue) >= batch.batch_size, f"bucket {batch.bucket} is planned beyond its end"
        taken = tuple(queue[: batch.batch_size])
        del queue[: batch.batch_size]
        named.append(replace(batch, samples=taken))
    return Group(group.degree, tuple(named))
