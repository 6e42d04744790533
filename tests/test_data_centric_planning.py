"""Data-centric planning: planners against brute force, profiles that are whole or refused."""

import csv
import itertools
from dataclasses import replace

import numpy as np
import pytest

from dcp.datacentric.buckets import Bucket, draw_buckets, text_buckets, video_buckets
from dcp.datacentric.choosers import make_chooser
from dcp.datacentric.config import PRESETS, DataCentricArguments
from dcp.datacentric.costs import Costs
from dcp.datacentric.draw import draw_choices, share_out
from dcp.datacentric.inter import accumulate
from dcp.datacentric.intra import retune
from dcp.datacentric.iteration import epoch_imbalance, imbalance
from dcp.datacentric.profile import Profile
from dcp.datacentric.recompute import LayerKind, keep_activations
from dcp.datacentric.schedule import epoch_iterations
from dcp.datacentric.search import candidate_degrees, search
from tests.sample_costs import BUCKETS, checked_epoch, make_profile, measured

# --------------------------------------------------------------------------- balance


def test_the_imbalance_of_the_example():
    assert imbalance([10, 4, 1]) == pytest.approx(0.5)
    assert imbalance([3, 3]) == imbalance([]) == 0
    assert epoch_imbalance([[10, 4, 1], [5, 5, 5]]) == pytest.approx(5 / 15)


def test_accumulation_of_the_example_is_even():
    counts = accumulate([10, 4, 1], [1, 1, 1], [64] * 3, max_steps=3)
    assert imbalance(np.array([10, 4, 1]) * counts) == 0
    assert counts == [2, 5, 20]
    assert accumulate([10, 4, 1], [1, 1, 1], [64, 64, 7], max_steps=3)[2] == 7, "a cap on counts"
    assert accumulate([10, 4, 1], [1, 1, 1], [64] * 3, max_steps=1) == [1, 2, 10], "a cap on time"
    assert max(accumulate([1, 1], [1, 1], [64] * 2, max_steps=9, min_steps=5)) == 5


@pytest.mark.parametrize("seed", range(30))
def test_accumulation_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 4))
    seconds, degrees = rng.integers(1, 12, size), rng.integers(1, 5, size)
    most, max_steps = rng.integers(1, 7, size), int(rng.integers(1, 5))
    min_steps, sync = int(rng.integers(1, 5)), float(rng.choice([0.0, 3.0]))

    def cost(counts):
        return ((counts * seconds).max() + sync) / (counts * seconds * degrees).sum()

    every = [np.array(c) for c in itertools.product(*(range(1, m + 1) for m in most))]
    every = [c for c in every if (c * seconds).max() <= max_steps * seconds.max()]
    reach = min(min_steps, max(c.max() for c in every))
    wanted = min(cost(c) for c in every if c.max() >= reach)
    counts = np.array(
        accumulate(
            seconds, degrees, most, max_steps=max_steps, min_steps=min_steps, sync_seconds=sync
        )
    )
    assert (counts <= most).all()
    assert (counts >= 1).all()
    assert counts.max() >= reach
    assert (counts * seconds).max() <= max_steps * seconds.max()
    assert cost(counts) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(20))
def test_retuning_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, 5))
    costs = Costs(make_profile(num_ranks=num_ranks, max_batch=4))
    remaining = {bucket.name: int(rng.integers(1, 6)) for bucket in BUCKETS}
    drawn = [str(rng.choice(list(remaining))) for _ in range(int(rng.integers(1, num_ranks + 1)))]
    drawn = [b for i, b in enumerate(drawn) if drawn[:i].count(b) < remaining[b]]
    share = share_out(drawn, remaining)

    def rate(chosen):
        done = sum(n * costs.sample_rank_seconds(b) for b, _, n in chosen)
        return done / (max(costs.seconds(b, d, n) for b, d, n in chosen) + costs.sync_seconds)

    best = {}
    for count in range(1, len(drawn) + 1):
        options = [
            [
                (b, d, n)
                for d in costs.degrees(b)
                for n in range(1, min(m, costs.max_batch(b, d)) + 1)
            ]
            for b, m in zip(drawn[:count], share, strict=False)
        ]
        for chosen in itertools.product(*options):
            if sum(d for _, d, _ in chosen) == num_ranks:
                best[count] = max(best.get(count, 0.0), rate(chosen))
    found = retune(drawn, remaining, num_ranks, costs)
    if found is None:
        assert not best
        return
    assert sum(choice.degree for choice in found) == num_ranks
    mixed = max(n for n, value in best.items() if value >= 0.95 * max(best.values()))
    assert [choice.bucket for choice in found] == drawn[:mixed]
    chosen = [(c.bucket, c.degree, c.batch_size) for c in found]
    assert rate(chosen) == pytest.approx(best[mixed])


@pytest.mark.parametrize("seed", range(20))
def test_kept_activations_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    kinds = [
        LayerKind(
            str(i), int(rng.integers(0, 5)), float(rng.integers(0, 9)), int(rng.integers(0, 9))
        )
        for i in range(rng.integers(1, 4))
    ]
    free = int(rng.integers(0, 60))
    best = max(
        sum(c * kind.forward_seconds for c, kind in zip(counts, kinds, strict=True))
        for counts in itertools.product(*(range(kind.count + 1) for kind in kinds))
        if sum(c * kind.activation_bytes for c, kind in zip(counts, kinds, strict=True)) <= free
    )
    keep = keep_activations(kinds, free)
    assert sum(keep[kind.name] * kind.activation_bytes for kind in kinds) <= free
    assert sum(keep[kind.name] * kind.forward_seconds for kind in kinds) == best


# --------------------------------------------------------------------------- iterations


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 6])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_rank_every_iteration_and_every_sample_once(preset, num_ranks):
    profile = make_profile(num_ranks=num_ranks)
    chooser = make_chooser(profile, DataCentricArguments(preset=preset))
    iterations = checked_epoch(chooser, profile, num_ranks)
    assert not any(iteration.idle_ranks for iteration in iterations)


@pytest.mark.parametrize(("num_ranks", "sp_size"), [(1, 1), (4, 1), (4, 2), (6, 4)])
def test_without_switches_all_groups_have_one_degree(num_ranks, sp_size):
    profile = make_profile(num_ranks=num_ranks)
    chooser = make_chooser(profile, DataCentricArguments(sp_size=sp_size))
    for iteration in checked_epoch(chooser, profile, num_ranks):
        busy = [group for group in iteration.groups if group.micro_batches]
        assert {group.degree for group in busy} == {sp_size}
        assert all(len(group.micro_batches) == 1 for group in busy)


def test_ranks_that_no_degree_fills_idle_and_say_so():
    profile = make_profile(num_ranks=2, memory=80_000)  # "long" needs two ranks, and has no more
    bucket_of = ["long"] * 5
    for preset in ("intra", "inter"):
        chooser = make_chooser(profile, DataCentricArguments(preset=preset))
        iterations = list(epoch_iterations(chooser, bucket_of, 3, seed=0, epoch=0))
        assert sum(iteration.num_samples for iteration in iterations) == 5
        assert {iteration.idle_ranks for iteration in iterations} == {1}
        with pytest.raises(ValueError, match="no bucket of long runs on 1 ranks"):
            next(epoch_iterations(chooser, bucket_of, 1, seed=0, epoch=0))


def test_draws_follow_the_remaining_work():
    costs = Costs(make_profile())
    remaining = {"short": 1000, "middle": 0, "long": 10}
    rng = np.random.default_rng(0)
    drawn = [draw_choices(costs, remaining, 1, rng)[0][0].bucket for _ in range(2000)]
    work = {b: n * costs.best(b, max_degree=1).rank_seconds for b, n in remaining.items()}
    share = work["long"] / sum(work.values())
    assert drawn.count("long") / 2000 == pytest.approx(share, abs=0.03)
    assert "middle" not in drawn


def test_presets_are_the_switches_they_stand_for():
    assert DataCentricArguments(preset="inter+PAC").dynamic_recompute
    assert not DataCentricArguments(preset="inter").dynamic_recompute
    assert DataCentricArguments(preset="inter", dynamic_recompute=True).dynamic_recompute
    assert not DataCentricArguments().dynamic_sp


def test_explicit_switches_win_over_the_preset():
    keys = DataCentricArguments(
        preset="inter+PAC", dynamic_sp=False, dynamic_recompute=False, sp_size=2
    )
    switches = (keys.dynamic_sp, keys.auto_grad_accumulation, keys.dynamic_recompute)
    assert switches == (False, True, False)
    chosen = make_chooser(make_profile(), keys)(
        {"short": 40, "middle": 8}, 8, np.random.default_rng(0)
    )
    assert {group.degree for group in chosen.groups if group.micro_batches} == {2}
    assert max(len(group.micro_batches) for group in chosen.groups) > 1
    left_open = replace(DataCentricArguments(), preset="inter")
    assert left_open == DataCentricArguments(preset="inter")


def test_keys_without_effect_are_refused():
    with pytest.raises(ValueError, match="preset must be one of"):
        DataCentricArguments(preset="outer")
    with pytest.raises(ValueError, match="--sp-size 2 has no effect where dynamic_sp chooses"):
        DataCentricArguments(preset="inter", sp_size=2)
    with pytest.raises(ValueError, match="--max-micro-batches 8 has no effect without auto_grad"):
        DataCentricArguments(preset="intra", max_micro_batches=8)
    with pytest.raises(ValueError, match="--max-micro-batches must be 1 or more, got 0"):
        DataCentricArguments(max_micro_batches=0)
    with pytest.raises(ValueError, match="--alloc-memory-fraction must be above 0 and at most 1"):
        DataCentricArguments(alloc_memory_fraction=1.5)


def test_buckets():
    assert len({bucket.name for bucket in video_buckets()}) == 25
    assert video_buckets()[-1].shape == (120, 90, 160)
    assert [bucket.size for bucket in text_buckets(300)] == [64, 128, 256, 300]
    assert [bucket.size for bucket in text_buckets(50)] == [50]
    mean = {d: np.mean([b.size for b in draw_buckets(BUCKETS, 300, d)]) for d in ("short", "long")}
    assert mean["short"] < mean["long"]


# --------------------------------------------------------------------------- profile


def test_extrapolation_is_exact_where_layers_are_alike():
    profile = make_profile(depth=6)
    one = profile.found["short", 1, 1]
    forward = one.layers["spatial"].forward_seconds
    # 4 more layers of each kind, each with two forward passes and a backward one
    wanted = one.seconds + 4 * (2 * forward + 2 * forward) * 1.5
    cost = profile.cost(("short", 1, 1))
    assert cost.seconds == pytest.approx(wanted)
    assert cost.num_bytes == 1000 + one.peak_bytes + 4 * 2 * 80
    kept = profile.cost(("short", 1, 1), recompute=False)
    assert kept.keep == {"spatial": 6, "temporal": 6}
    assert kept.seconds == pytest.approx(wanted - 6 * 1.5 * forward)
    assert kept.num_bytes <= profile.memory_bytes


def test_the_search_stops_at_the_memory_limit():
    profile = make_profile(memory=200_000)
    slowest = profile.cost(("long", 1, 1)).seconds
    for bucket in BUCKETS:
        for degree in candidate_degrees(4):
            sizes = [n for b, d, n in profile.found if (b, d) == (bucket.name, degree)]
            assert sizes == [2**i for i in range(len(sizes))]
            costs = [profile.cost((bucket.name, degree, n)) for n in sizes]
            assert all(cost and cost.seconds <= slowest for cost in costs[:-1])
            assert sizes[-1] == 16 or costs[-1] is None or costs[-1].seconds > slowest


def test_a_bucket_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="bucket 'long' does not fit: one sample needs"):
        make_profile(memory=20_000)
    with pytest.raises(ValueError, match=r"bucket 'huge' does not fit: .* more than the device"):
        make_profile([Bucket("huge", (10**6,))])
    only_wide = make_profile(memory=60_000)
    assert only_wide.cost(("long", 1, 1)) is None
    with pytest.raises(ValueError, match="bucket 'long' fits in memory at none of the degrees"):
        Costs(only_wide, degrees=[1])


def test_a_search_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "profile.json"
    calls = []

    def run(limit):
        profile = make_profile([])
        if path.exists():
            profile = Profile.load(path, machine=profile.machine, model=profile.model)

        def measure(*case):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(case)
            return measured(*case)

        limits = {bucket.name: 4 for bucket in BUCKETS}
        search(profile, BUCKETS, [1, 2], measure, max_batch=limits, save=lambda: profile.save(path))
        return profile

    with pytest.raises(KeyboardInterrupt):
        run(5)
    profile = run(100)
    assert len(calls) == len(set(calls)) == len(profile.found)
    again = Profile.load(path)
    assert again == profile
    assert all(type(n) is int for key in again.found for n in key[1:])
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert len(rows) == len(calls)
    assert float(rows[0]["predicted_seconds"]) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not a profile"),
        (lambda text: "[]", "is not a profile"),
        (lambda text: text.replace("profile 1", "profile 0"), "its format is not"),
        (lambda text: text.replace('"peak_bytes": ', '"peak_bytes": -'), "numbers of 0 or more"),
        (lambda text: text.replace('"seconds"', '"minutes"'), "is not a profile"),
        (lambda text: text.replace('"fake"', '"other"'), "of another model: name is 'other'"),
        (
            lambda text: text.replace('"none"', '"b"'),
            "of another machine: name is 'b' there, 'none'",
        ),
    ],
)
def test_a_corrupt_or_foreign_profile_is_refused(tmp_path, change, message):
    path = tmp_path / "profile.json"
    make_profile().save(path)
    Profile.load(path, machine={"name": "none"}, model={"name": "fake"})
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        Profile.load(path, machine={"name": "none"}, model={"name": "fake"})
