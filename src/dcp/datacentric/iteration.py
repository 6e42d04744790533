"""What an iteration consists of, and how well its groups are balanced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket that go through the model together.

    ``keep``: (kind, layers that keep their activations). ``samples`` are filled in last: a chooser
    counts, a schedule names.
    """

    bucket: str
    batch_size: int
    seconds: float
    keep: tuple[tuple[str, int], ...] = ()
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class RankGroup:
    """``degree`` ranks that share every sample of their micro-batches; without any they idle."""

    degree: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def seconds(self) -> float:
        """Predicted."""
        return sum(each.seconds for each in self.micro_batches)


@dataclass(frozen=True)
class Iteration:
    """One optimiser step. Groups lie on consecutive ranks, in their order."""

    groups: tuple[RankGroup, ...]

    @classmethod
    def of(cls, groups: Sequence[RankGroup], *, idle: int = 0) -> Iteration:
        """Groups by descending degree, so that those of powers of two keep inside nodes; then
        ``idle`` ranks, as a group without samples."""
        ordered = sorted(groups, key=lambda group: -group.degree)
        return cls((*ordered, *([RankGroup(idle, ())] if idle else [])))

    @property
    def num_ranks(self) -> int:
        return sum(group.degree for group in self.groups)

    @property
    def num_samples(self) -> int:
        return sum(b.batch_size for group in self.groups for b in group.micro_batches)

    @property
    def idle_ranks(self) -> int:
        """Ranks in groups without samples."""
        return sum(group.degree for group in self.groups if not group.micro_batches)

    @property
    def samples(self) -> list[int]:
        return [s for g in self.groups for b in g.micro_batches for s in b.samples]

    def group_of(self, rank: int) -> tuple[int, RankGroup]:
        """The first rank of a rank's group, and the group."""
        first = 0
        for group in self.groups:
            if rank < first + group.degree:
                return first, group
            first += group.degree
        raise ValueError(f"rank {rank} is not one of the {self.num_ranks} of this iteration")

    def rank_seconds(self) -> np.ndarray:
        """Predicted seconds of every rank, ``[ranks]``."""
        return np.repeat([g.seconds for g in self.groups], [g.degree for g in self.groups])


def imbalance(seconds: Sequence[float] | np.ndarray) -> float:
    """Share of the ranks' time that is spent waiting for the slowest: 0 is perfect.

    Args:
        seconds: every rank's own work.
    """
    seconds = np.asarray(seconds, dtype=float)
    longest = seconds.max(initial=0.0)
    return float(1 - seconds.mean() / longest) if longest > 0 else 0.0


def epoch_imbalance(iterations: Iterable[Sequence[float] | np.ndarray]) -> float:
    """The same over many iterations, each as long as its slowest rank."""
    every = [np.asarray(seconds, dtype=float) for seconds in iterations]
    longest = sum(float(seconds.max()) for seconds in every)
    waited = sum(float(seconds.max() - seconds.mean()) for seconds in every)
    return waited / longest if longest > 0 else 0.0
