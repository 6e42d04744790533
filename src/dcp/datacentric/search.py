"""The search over degrees and batch sizes, up to the memory limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dcp.datacentric.buckets import Bucket
from dcp.datacentric.profile import Key, Measurement, Profile

Measure = Callable[[Bucket, int, int], Measurement | None]


def candidate_degrees(num_ranks: int) -> list[int]:
    """Degrees that are tried on ``num_ranks`` ranks: powers of two, three times those, and all."""
    powers = {2**power for power in range(num_ranks.bit_length())}
    return sorted(
        d for d in powers | {3 * power for power in powers} | {num_ranks} if d <= num_ranks
    )


def search(
    profile: Profile,
    buckets: Sequence[Bucket],
    degrees: Sequence[int],
    measure: Measure,
    *,
    max_batch: Mapping[str, int],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Measure every bucket at every degree, batch sizes doubling until one does not fit.

    They stop, too, where a micro-batch takes longer than one sample of the largest bucket at its
    least degree: iterations last as long in any case, and accumulation fills them as well.

    What the profile holds already is not measured again, so that a search that was interrupted
    goes on. Buckets go from the largest down: what cannot run is known first.

    Args:
        measure: (bucket, degree, batch size) -> a measurement, or None if memory ran out.
        max_batch: largest batch size of each bucket, by name.
        save: called after every measurement.

    Raises ``ValueError`` that names a bucket which fits at no degree.
    """
    slowest = 0.0
    for bucket in sorted(buckets, key=lambda bucket: -bucket.size):
        for degree in degrees:
            batch_size = 1
            while batch_size <= max_batch[bucket.name]:
                key: Key = (bucket.name, degree, batch_size)
                if key not in profile.found:
                    profile.found[key] = measure(bucket, degree, batch_size)
                    save()
                cost = profile.cost(key)
                slowest = slowest or (cost.seconds if cost else 0.0)  # the first that fits
                if cost is None or cost.seconds > slowest:
                    break
                batch_size *= 2
        _require_fit(profile, bucket, degrees)


def _require_fit(profile: Profile, bucket: Bucket, degrees: Sequence[int]) -> None:
    if any(profile.cost((bucket.name, degree, 1)) for degree in degrees):
        return
    measured = [profile.found.get((bucket.name, degree, 1)) for degree in degrees]
    needs = [profile.extrapolate(each)[1] for each in measured if each is not None]
    least = f"{min(needs) / 2**20:.0f} MiB at best" if needs else "more than the device has"
    raise ValueError(
        f"bucket {bucket.name!r} does not fit: one sample needs {least}, a rank may use "
        f"{profile.memory_bytes / 2**20:.0f} MiB, at degrees {', '.join(map(str, degrees))}; "
        "leave the bucket out, or use more ranks or memory"
    )
