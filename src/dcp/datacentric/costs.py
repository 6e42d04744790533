"""What a chooser asks of a profile: seconds of any batch size, and each bucket's best choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcp.datacentric.iteration import MicroBatch, RankGroup
from dcp.datacentric.profile import Profile


@dataclass(frozen=True)
class Choice:
    """A way to run micro-batches of a bucket: seconds of one, all its samples present."""

    bucket: str
    degree: int
    batch_size: int
    seconds: float

    @property
    def rank_seconds(self) -> float:
        """Ranks' time per sample."""
        return self.seconds * self.degree / self.batch_size


@dataclass(frozen=True)
class _Table:
    """Of one bucket and degree, by batch size less one."""

    seconds: np.ndarray
    keep: list[dict[str, int]]


class Costs:
    """Seconds and kept layers by (bucket, degree, batch size), and the best choices.

    Between two measured batch sizes, seconds are interpolated, and as many layers keep their
    activations as at the larger one.

    Args:
        profile: of all buckets that will be asked for.
        recompute: every layer recomputes; otherwise those do that memory has no room for.
        degrees: the only degrees to use; None uses all that were profiled.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        recompute: bool = True,
        degrees: Sequence[int] | None = None,
    ) -> None:
        self.sync_seconds = profile.sync_seconds
        self._tables: dict[str, dict[int, _Table]] = {}
        sizes: dict[tuple[str, int], list[int]] = {}
        for bucket, degree, size in profile.found:
            if degrees is None or degree in degrees:
                sizes.setdefault((bucket, degree), []).append(size)
        for (bucket, degree), tried in sorted(sizes.items()):
            table = _tabulate(profile, bucket, degree, sorted(tried), recompute=recompute)
            if table is not None:
                self._tables.setdefault(bucket, {})[degree] = table
        for bucket in {key[0] for key in profile.found} - self._tables.keys():
            raise ValueError(
                f"bucket {bucket!r} fits in memory at none of the degrees "
                f"{sorted(degrees or {degree for _, degree in sizes})}"
            )
        self._best = {bucket: max(self.choices(bucket), key=_merit) for bucket in self._tables}

    @property
    def buckets(self) -> list[str]:
        return list(self._tables)

    def degrees(self, bucket: str) -> list[int]:
        """Degrees at which a sample fits, ascending."""
        return list(self._tables[bucket])

    def max_batch(self, bucket: str, degree: int) -> int:
        """Most samples of a micro-batch."""
        return len(self._tables[bucket][degree].seconds)

    def seconds_by_size(self, bucket: str, degree: int) -> np.ndarray:
        """Seconds of 1, 2, … samples."""
        return self._tables[bucket][degree].seconds

    def most_within(self, bucket: str, degree: int, seconds: float, most: int) -> int:
        """Largest batch size of at most ``most`` that takes no longer; 0 where there is none."""
        table = self._tables[bucket].get(degree)
        if table is None or most < 1:
            return 0
        fits = np.flatnonzero(table.seconds[:most] <= seconds)
        return int(fits[-1]) + 1 if len(fits) else 0

    def seconds(self, bucket: str, degree: int, batch_size: int) -> float:
        return float(self._tables[bucket][degree].seconds[batch_size - 1])

    def keep(self, bucket: str, degree: int, batch_size: int) -> dict[str, int]:
        """Layers of each kind that keep their activations."""
        return self._tables[bucket][degree].keep[batch_size - 1]

    def choices(self, bucket: str, *, max_degree: int | None = None) -> list[Choice]:
        """Every degree and batch size, up to ``max_degree``."""
        return [
            Choice(bucket, degree, number + 1, float(seconds))
            for degree, table in self._tables[bucket].items()
            if max_degree is None or degree <= max_degree
            for number, seconds in enumerate(table.seconds)
        ]

    def best(self, bucket: str, *, max_degree: int | None = None) -> Choice | None:
        """Most samples per rank and second; None where no degree is small enough."""
        whole = self._best[bucket]
        if max_degree is None or whole.degree <= max_degree:
            return whole
        return max(self.choices(bucket, max_degree=max_degree), key=_merit, default=None)

    def group(self, choice: Choice, num_samples: int) -> RankGroup:
        """Full micro-batches, and a smaller last one; each with the time of its own size."""
        bucket, degree = choice.bucket, choice.degree
        whole, rest = divmod(num_samples, choice.batch_size)
        sizes = [choice.batch_size] * whole + [rest] * (rest > 0)
        batches = [
            MicroBatch(
                bucket,
                size,
                self.seconds(bucket, degree, size),
                tuple(self.keep(bucket, degree, size).items()),
            )
            for size in sizes
        ]
        return RankGroup(degree, tuple(batches))

    def sample_rank_seconds(self, bucket: str) -> float:
        """Ranks' time of a sample at the bucket's best choice: what a sample is worth."""
        return self._best[bucket].rank_seconds


def _merit(choice: Choice) -> tuple[float, int, int]:
    return -choice.rank_seconds, -choice.degree, -choice.batch_size


def _tabulate(
    profile: Profile, bucket: str, degree: int, sizes: list[int], *, recompute: bool
) -> _Table | None:
    fits = [(n, profile.cost((bucket, degree, n), recompute=recompute)) for n in sizes]
    known = [(n, cost) for n, cost in fits if cost is not None]
    if not known:
        return None
    measured = [profile.found[bucket, degree, n] for n, _ in known]
    at = np.array([n for n, _ in known])
    every = np.arange(1, at[-1] + 1)
    seconds = np.interp(every, at, [profile.extrapolate(m)[0] for m in measured if m])
    larger = np.searchsorted(at, every)
    keep = [known[index][1].keep for index in larger.tolist()]
    for kind in profile.depth:
        forward = np.interp(every, at, [m.layers[kind].forward_seconds for m in measured if m])
        seconds -= forward * [kept[kind] for kept in keep]
    return _Table(np.maximum(seconds, 1e-9), keep)
