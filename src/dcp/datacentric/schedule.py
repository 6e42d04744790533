"""An epoch: iterations until every sample was used once, the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dcp.datacentric.choosers import Chooser
from dcp.datacentric.iteration import Iteration, RankGroup


def epoch_iterations(
    chooser: Chooser, bucket_of: Sequence[str], num_ranks: int, *, seed: int, epoch: int
) -> Iterator[Iteration]:
    """Iterations of one epoch, with the samples named. Each sample occurs exactly once.

    Args:
        chooser: (remaining by bucket, ranks, generator) -> iteration.
        bucket_of: the bucket of every sample.
        seed, epoch: of the order; nothing else is random.
    """
    rng = np.random.default_rng([seed, epoch])
    waiting: dict[str, list[int]] = {}
    for sample in rng.permutation(len(bucket_of)).tolist():
        waiting.setdefault(bucket_of[sample], []).append(sample)
    while any(waiting.values()):
        counts = {bucket: len(samples) for bucket, samples in waiting.items()}
        iteration = chooser(counts, num_ranks, rng)
        planned = iteration.num_ranks
        assert planned == num_ranks, f"{planned} of {num_ranks} ranks have a group"
        if not iteration.num_samples:
            raise ValueError(
                f"no bucket of {', '.join(b for b, n in counts.items() if n)} runs on {num_ranks} "
                "ranks: none of its degrees is small enough; measure the profile on these"
            )
        yield Iteration(tuple(_name(group, waiting) for group in iteration.groups))


def _name(group: RankGroup, waiting: dict[str, list[int]]) -> RankGroup:
    """The group with samples taken from those that wait."""
    named = []
    for batch in group.micro_batches:
        queue = waiting[batch.bucket]
        assert len(queue) >= batch.batch_size, f"bucket {batch.bucket} is used beyond its end"
        taken = tuple(queue[: batch.batch_size])
        del queue[: batch.batch_size]
        named.append(replace(batch, samples=taken))
    return RankGroup(group.degree, tuple(named))
