"""Several planning ranks: who plans what, who takes over, who shares, and how much is in flight."""

import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dcp import AttentionSpec, Cluster, SequenceBatch, plan
from dcp.data import PlanningError, PlanningPool
from dcp.data.ahead import Deal
from dcp.data.exchange import Share
from dcp.data.messages import answer_from_bytes, request_to_bytes
from dcp.data.pool import open_pool
from dcp.data.worker import answer_or_refusal
from tests import loading
from tests.loading import LENGTHS, SPEC, AtOnce, documents_of, worker_pids

MANY = documents_of(LENGTHS * 2)


def loader_of(dataset=MANY, *args, **options):
    return loading.loader_of(dataset, *args, **options)


def drain(loader):
    """(token, label, position) of each local token, batch by batch."""
    return [list(zip(*columns, strict=True)) for *columns, _ in loading.drain(loader)]


def together(parts):
    """The batches of all ranks of a plan, each sorted."""
    return [sorted(chain.from_iterable(batch)) for batch in zip(*parts, strict=True)]


def alone(num_epochs=1):
    with loader_of() as loader:
        return [together([drain(loader)]) for _ in range(num_epochs)]


# --------------------------------------------------------------------------- the deal


@given(st.permutations(range(5)), st.integers(1, 5), st.data())
def test_planners_take_turns_and_only_lost_turns_move(order, count, data):
    planners = order[:count]
    deal = Deal(planners)
    turns = [deal.planner(i) for i in range(120)]
    assert turns == planners * (120 // count) + planners[: 120 % count]
    for lost in data.draw(st.permutations(planners)):
        before = [deal.planner(i) for i in range(120)]
        deal.lost.add(lost)
        after = [deal.planner(i) for i in range(120)]
        left = set(planners) - deal.lost
        for one, other in zip(before, after, strict=True):
            assert other == one or (one == lost and other in (left or {None}))
    assert set(after) == {None}


def test_lost_turns_go_round_the_others():
    deal = Deal([0, 1, 2])
    deal.lost.add(1)
    assert [deal.planner(i) for i in (1, 4, 7, 10)] == [0, 2, 0, 2]


# --------------------------------------------------------------------------- pools that die


def kill_for_good(pool):
    """SIGKILL every worker of a pool now, and each new one as soon as it starts, to the end."""
    killed = set()

    def kill():
        for pid in set(worker_pids(pool)) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)

    def go_on():
        while pool._jobs.ended is None:
            kill()
            time.sleep(0.005)

    kill()
    threading.Thread(target=go_on, daemon=True).start()


def losing_pools_on_each_rank(victims):
    """An epoch with the pools of some ranks killed after three batches, and the warnings."""
    options = {"group": dist.group.WORLD, "num_workers": 1, "look_ahead": 1}
    options["planning_ranks"] = (2, 0)
    with warnings.catch_warnings(record=True) as caught, loader_of(**options) as loader:
        warnings.simplefilter("always")
        batches, error = [], None
        try:
            for batch, _ in loader:
                columns = (batch.tokens, batch.labels, batch.positions)
                batches.append(list(zip(*(c.tolist() for c in columns), strict=True)))
                if len(batches) == 3 and dist.get_rank() in victims:
                    kill_for_good(loader._pool)
        except PlanningError as raised:
            error = str(raised)
        dist.barrier()
    return batches, [str(warning.message) for warning in caught], error


def test_a_lost_pool_hands_its_batches_over(gloo_pool):
    results = gloo_pool(3).run(losing_pools_on_each_rank, {2})
    batches, messages, errors = zip(*results, strict=True)
    assert errors == (None, None, None)
    assert together(batches) == alone()[0]
    assert (messages[1], messages[2]) == ([], [])
    (message,) = messages[0]
    assert "rank 2 lost its planning pool (3 planning workers in a row died" in message
    assert "its batches are planned by rank 0 from now on" in message


def test_without_any_pool_all_ranks_raise(gloo_pool):
    for _, _, error in gloo_pool(3).run(losing_pools_on_each_rank, {0, 2}):
        assert "could not plan, and no other can: 3 planning workers in a row died" in error


def no_batches_on_each_rank():
    options = {"group": dist.group.WORLD, "packing": "ordered", "planning_ranks": (0, 2)}
    try:
        loader_of([np.arange(9)], **options)
    except (ValueError, PlanningError) as error:
        return str(error)
    return None


def test_all_ranks_hear_that_there_are_no_batches(gloo_pool):
    messages = gloo_pool(3).run(no_batches_on_each_rank)
    assert all("no batch of epoch 0 is 75% full" in message for message in messages)


def fails_on_rank_two(case):
    """Batches and error of each rank where something of planning fails on rank 2 alone."""
    here = dist.get_rank() == 2

    def mask_fn(seqlens, samples):
        if here and case == "mask":
            raise ValueError("no mask today")
        return ["causal"] * len(seqlens)

    options = {"group": dist.group.WORLD, "planning_ranks": (0, 2), "look_ahead": 1}
    dataset = Unsteady(MANY, broken=here and case == "lengths")
    count = 0
    try:
        if case == "limit":
            options |= {"over_long": "raise", "tokens_per_batch": 33 if here else 128}
        with loader_of(dataset, mask_fn, **options) as loader:
            state = loader.state_dict()
            if case == "state":
                loader.load_state_dict(state | {"position": 1, "document_tokens": 432 + here})
            for _ in loader:
                count += 1
    except (ValueError, PlanningError, KeyError) as error:
        return count, type(error).__name__, str(error)
    raise AssertionError("nothing failed")


class Unsteady(list):
    """Documents whose lengths are perhaps not known."""

    def __init__(self, documents, *, broken):
        super().__init__(documents)
        self.broken = broken

    @property
    def lengths(self):
        if self.broken:
            raise KeyError("length")
        return np.array([len(document) for document in self])


@pytest.mark.parametrize(
    ("case", "kind", "batch", "match"),
    [
        ("mask", "ValueError", 1, "no mask today"),  # rank 2's turn
        ("limit", "ValueError", 0, "document 1 has 70 tokens, more than tokens_per_batch=33"),
        ("lengths", "PlanningError", 0, "rank 2 could not plan: KeyError: 'length'"),
        ("state", "ValueError", 0, "cannot resume: document_tokens was 433 and is 432"),
    ],
)
def test_what_fails_on_one_planning_rank_fails_on_all_at_once(gloo_pool, case, kind, batch, match):
    found = gloo_pool(3).run(fails_on_rank_two, case)
    for rank, (count, name, error) in enumerate(found):  # long before 600 s, as a rank may wait
        assert count == batch
        if (rank, case) != (2, "lengths"):
            assert name == kind
            assert match in error


def planner_that_fails():
    def mask_fn(seqlens, samples):
        raise ValueError("no mask today")

    with loader_of(MANY, mask_fn, group=dist.group.WORLD) as loader:
        store = dist.distributed_c10d._get_default_store()
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(1)
            store.set("the other asks", "")
        with pytest.raises(ValueError, match="no mask today"):
            next(iter(loader))
        return store.check(["the other asks"]), 0 in loader._ahead._unread


def test_a_planner_that_fails_stays_until_the_others_know(gloo_pool):
    (stayed, unread), _ = gloo_pool(2).run(planner_that_fails)
    assert stayed  # its process may be the one that serves the store
    assert not unread  # and no longer than that


def planner_that_never_plans():
    with loader_of(group=dist.group.WORLD, timeout_seconds=0.5) as loader:
        dist.barrier()
        if dist.get_rank() == 1:
            with pytest.raises(PlanningError, match=r"rank 0 sent no plan within 0\.5 s: it died"):
                next(iter(loader))
        dist.barrier()  # where rank 0 waits, which plans nothing


def test_a_rank_waits_for_a_plan_no_longer_than_told(gloo_pool):
    gloo_pool(2).run(planner_that_never_plans)


# --------------------------------------------------------------------------- sharing, flow, size


def sharing_on_each_rank(num_epochs):
    """Four ranks of two tensor-parallel pairs: what each reads, and keys left in the store."""
    rank = dist.get_rank()
    attention = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    cluster = Cluster(num_nodes=2, devices_per_node=1)
    options = {"attention_group": attention[rank % 2], "cluster": cluster}
    with loader_of(group=dist.group.WORLD, **options) as loader:
        epochs, keys = [], []
        for _ in range(num_epochs):
            epochs.append(drain(loader))
            dist.barrier()
            keys.append(loader._exchange._store.num_keys())
            dist.barrier()
        return loader.planning_ranks, epochs, keys


def test_ranks_of_a_group_share_a_plan_and_the_store_stays_clean(gloo_pool):
    planning_ranks, shares, keys = zip(*gloo_pool(4).run(sharing_on_each_rank, 3), strict=True)
    assert set(planning_ranks) == {(0, 2)}  # the first of each node
    assert shares[0] == shares[1]
    assert shares[2] == shares[3]
    assert shares[0] != shares[2]
    for number, wanted in enumerate(alone(3)):
        assert together([shares[0][number], shares[2][number]]) == wanted
    first, *_, last = keys[0]
    assert last <= first + 2 * 5 * 2  # what is planned ahead, not what was read


def wrong_groups_on_each_rank():
    halves = [dist.new_group([0]), dist.new_group([1, 2])]
    with pytest.raises(ValueError, match=r"the sizes are \(1, 2, 2\)"):
        loader_of(group=dist.group.WORLD, attention_group=halves[dist.get_rank() > 0])


def test_attention_groups_must_match(gloo_pool):
    gloo_pool(3).run(wrong_groups_on_each_rank)
    with pytest.raises(ValueError, match="attention_group needs group"):
        loader_of(attention_group=object())


def uneven_readers(look_ahead):
    """How far the planning rank gets while the other reads nothing, and whether both end."""
    store = dist.distributed_c10d._get_default_store()
    key = f"progress-{look_ahead}"
    with loader_of(group=dist.group.WORLD, look_ahead=look_ahead) as loader:
        store.set(key, "0")
        dist.barrier()
        progress = 0
        if dist.get_rank() == 1:
            deadline = time.perf_counter() + 60
            while int(store.get(key)) <= 2 * look_ahead and time.perf_counter() < deadline:
                time.sleep(0.02)
            time.sleep(0.5)  # in which it would go on if nothing held it
            progress = int(store.get(key))
        count = 0
        for count, _ in enumerate(loader, start=1):
            if dist.get_rank() == 0:
                store.set(key, str(count))
        dist.barrier()
        return progress, count


@pytest.mark.parametrize("look_ahead", [1, 2])
def test_a_slow_reader_holds_the_planner_back(gloo_pool, look_ahead):
    (_, num_batches), (progress, also) = gloo_pool(2).run(uneven_readers, look_ahead)
    assert progress == 2 * look_ahead + 1 < num_batches == also


@pytest.mark.parametrize(
    ("seqlens", "mask", "block_size"),
    [
        ([131072], "causal", 512),
        ([14012, 17516, 11398, 7178, 9954, 6654, 14645, 38252, 9678, 1785], "causal", "auto"),
        ([1024] * 128, "shared_question", "auto"),
    ],
)
def test_a_share_stays_far_below_a_megabyte(seqlens, mask, block_size):
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    cluster = Cluster(num_nodes=4, devices_per_node=8)
    made = plan(SequenceBatch(seqlens, mask), spec, cluster, block_size=block_size)
    pieces = np.array([[i * 7919, 0, n, n] for i, n in enumerate(seqlens)])
    shares = [Share(pieces, 131072, False, 1, made.rank_plan(r).to_bytes()) for r in range(32)]
    sizes = [len(share.to_bytes()) for share in shares]
    assert min(sizes) > 500
    assert max(sizes) < 1e6 / 10


# --------------------------------------------------------------------------- figures and reading


def test_waiting_and_depth_are_measured(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dcp.data.ahead.time.perf_counter", lambda: clock[0])

    class ThreeSeconds(AtOnce):
        def submit(self, request):
            clock[0] += 3
            return super().submit(request)

    with loader_of(planning_pool=ThreeSeconds(), look_ahead=2) as loader:
        batches = iter(loader)
        first, _ = next(batches)
        clock[0] += 50  # which the consumer takes
        second, plan_of_second = next(batches)
    assert (first.planned_ahead, first.plan_wait_seconds) == (0, 9)  # this batch and two ahead
    assert (second.planned_ahead, second.plan_wait_seconds) == (2, 3)  # the third ahead
    assert plan_of_second.stats.planning_seconds >= 0


class Counting:
    """A dataset that counts which documents are read."""

    def __init__(self, documents):
        self.documents, self.read = documents, []
        self.lengths = np.array([len(document) for document in documents])

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        self.read.append(index)
        return self.documents[index]

    def num_loss_tokens(self, index, start, stop):
        return max(min(stop, int(self.lengths[index]) - 1) - start, 0)


def reads_on_each_rank():
    dataset = Counting(MANY)
    with loader_of(dataset, group=dist.group.WORLD, plan_options={}) as loader:
        dataset.read.clear()  # of what the ranks compared
        wanted = []
        for batch, _ in loader:
            wanted += sorted({token // 1000 for token in batch.tokens.tolist()})
        return sorted(dataset.read), sorted(wanted)


def test_each_rank_reads_the_documents_it_has_tokens_of(gloo_pool):
    results = gloo_pool(3).run(reads_on_each_rank)
    for read, wanted in results:
        assert read == wanted
    assert any(len(read) < len(MANY) for read, _ in results)


# --------------------------------------------------------------------------- other pools


class Threads:
    """The least pool there can be."""

    def __init__(self):
        self.threads, self.count, self.closed = ThreadPoolExecutor(1), 0, False

    def submit(self, request):
        self.count += 1
        return self.threads.submit(lambda: answer_from_bytes(answer_or_refusal(request)))

    def close(self):
        self.closed = True
        self.threads.shutdown()


def test_own_pools_serve():
    pool = Threads()
    with loader_of(planning_pool=pool) as loader:
        assert together([drain(loader)]) == alone()[0]
    assert pool.count > 4
    assert pool.closed
    with pytest.raises(ValueError, match="'processes', 'ray' or an object with submit and close"):
        loader_of(planning_pool="dask")


def test_ray_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="pip install ray"):
        loader_of(planning_pool="ray")


def test_ray_plans():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with loader_of(planning_pool="ray") as loader:
            assert together([drain(loader)]) == alone()[0]
        pool = open_pool("ray", num_workers=0)
        refused = pool.submit(request_to_bytes(SequenceBatch([9]), SPEC, Cluster(devices_per_node=1), {"strategy": "astrology"}))  # fmt: skip  # noqa: E501
        with pytest.raises(ValueError, match="'astrology' is not one of"):
            refused.result(60)
    finally:
        ray.shutdown()


def test_an_idle_worker_that_dies_is_replaced_when_it_is_needed():
    request = request_to_bytes(SequenceBatch([9]), SPEC, Cluster(devices_per_node=1), {})
    pool = PlanningPool(1)
    pool.submit(request).result(60)
    os.kill(worker_pids(pool)[0], signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="exit status -9"):
        assert len(pool.submit(request).result(60)) == 1
    pool.close()
