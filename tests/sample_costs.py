"""A profile of known costs, and what holds for every epoch that is chosen from it."""

from dcp.datacentric.buckets import Bucket, draw_buckets
from dcp.datacentric.profile import LayerCost, Measurement, Profile
from dcp.datacentric.schedule import epoch_iterations
from dcp.datacentric.search import candidate_degrees, search

BUCKETS = [Bucket("short", (8,)), Bucket("middle", (64,)), Bucket("long", (512,))]


def measured(bucket, degree, batch_size, *, room=4096):
    """A cost that is known: overhead, work that degrees divide, and their communication."""
    tokens = bucket.size * batch_size
    if tokens / degree > room:
        return None
    forward = (1 + tokens / degree) * 1e-3
    layers = {
        "spatial": LayerCost(forward, 2 * forward, 10 * tokens, 40 * tokens // degree),
        "temporal": LayerCost(forward / 2, forward, 10 * tokens, 30 * tokens // degree),
    }
    seconds = 9 * forward + 2e-3 * (degree - 1)
    return Measurement(seconds, 100 * tokens // degree, layers)


def make_profile(buckets=BUCKETS, *, num_ranks=4, memory=400_000, depth=6, max_batch=16):
    profile = Profile(
        machine={"name": "none"},
        model={"name": "fake"},
        depth={"spatial": depth, "temporal": depth},
        measured_depth={"spatial": 2, "temporal": 2},
        memory_bytes=memory,
        static_bytes=1000,
        sync_seconds=0.01,
    )
    limits = {bucket.name: max_batch for bucket in buckets}
    search(profile, buckets, candidate_degrees(num_ranks), measured, max_batch=limits)
    return profile


def checked_epoch(chooser, profile, num_ranks):
    """The iterations of an epoch of 90 samples: all ranks, every sample once, only what fits."""
    bucket_of = [bucket.name for bucket in draw_buckets(BUCKETS, 90, "balanced")]

    def epoch(number):
        return list(epoch_iterations(chooser, bucket_of, num_ranks, seed=1, epoch=number))

    iterations = epoch(0)
    assert all(iteration.num_ranks == num_ranks for iteration in iterations)
    samples = [sample for iteration in iterations for sample in iteration.samples]
    assert sorted(samples) == list(range(90))
    for iteration in iterations:
        for group in iteration.groups:
            for batch in group.micro_batches:
                assert {bucket_of[sample] for sample in batch.samples} == {batch.bucket}
                assert batch.seconds > 0
                cost = profile.cost((batch.bucket, group.degree, 1))
                assert cost is not None, "the bucket fits at that degree"
    assert iterations == epoch(0), "equal arguments, equal choices"
    assert iterations != epoch(1)
    return iterations
