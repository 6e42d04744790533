"""Documents, batches, and planning in other processes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp import AttnMask, Cluster, SequenceBatch, plan
from dcp.data import (
    ByteTokenizer,
    PlanningPool,
    PoolLost,
    TokenBudgetBatches,
    TokenDataset,
    open_documents,
)
from dcp.data.batching import BatchesFrom
from dcp.data.messages import (
    PlanningFailed,
    batch_from_wire,
    batch_to_wire,
    request_from_bytes,
    request_to_bytes,
)
from dcp.launch.environment import child_environment
from dcp.program import RankPlan
from dcp.wire import WireError
from tests.loading import SPEC, worker_pids

ONE = Cluster(devices_per_node=1)
TEXTS = ["one document", "", "zwei Dokumente, ä", "3" * 100]


# --------------------------------------------------------------------------- sources


def write_texts(folder, kind):
    if kind == "text":
        for number, text in enumerate(TEXTS):
            (folder / "deep").mkdir(exist_ok=True)
            (folder / "deep" / f"{number}.txt").write_text(text)
    elif kind == "jsonl":
        lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=number % 2 == 0) + "\n\n"
                 for number, text in enumerate(TEXTS)]  # fmt: skip
        (folder / "a.jsonl").write_text("".join(lines))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet", row_group_size=3)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_sources_give_the_texts_and_their_sizes(tmp_path, kind):
    write_texts(tmp_path, kind)
    documents = open_documents(str(tmp_path))
    assert [documents.read(i).decode() for i in range(len(documents))] == TEXTS
    assert documents.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    dataset = TokenDataset(documents)
    assert [len(dataset[i]) for i in range(4)] == dataset.lengths.tolist()
    assert ByteTokenizer().decode(dataset[2]) == TEXTS[2]


def test_the_default_source_is_sorted_and_long_tailed():
    documents = open_documents("python")
    assert documents.paths == sorted(documents.paths)
    assert len(documents) > 500
    assert documents.num_bytes.max() > 100 * np.median(documents.num_bytes)
    some = open_documents("python", limit=7)
    assert len(some) == 7
    assert some.read(3) == documents.read(3 * len(documents) // 7)


def test_source_errors_name_the_value(tmp_path):
    def refused(match, name, content, **options):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(ValueError, match=match):
            open_documents(str(path), **options)

    refused("bad.jsonl:2 is not a JSON line", "bad.jsonl", '{"text": "a"}\n{nonsense\n')
    refused("no text under 'body'", "b.jsonl", '{"text": "a"}\n', text_field="body")
    refused("not a Parquet file", "b.parquet", "PAR?")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the dataset is empty"):
        open_documents(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="'/no/such/place' is neither"):
        open_documents("/no/such/place")


def test_hugging_face_datasets_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_documents("hf:someone/something")


# --------------------------------------------------------------------------- batches

lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@given(lengths_strategy, st.integers(1, 50), st.integers(0, 3), st.data())
def test_every_token_once_an_epoch_within_the_budget(lengths, budget, epoch, data):
    longest = data.draw(st.none() | st.integers(1, budget))
    batches = TokenBudgetBatches(np.array(lengths), budget, max_seqlen=longest, over_long="split")
    seen = [np.zeros(n, dtype=int) for n in lengths]
    pieces_of = np.zeros(len(lengths), dtype=int)
    for pieces in batches.epoch(epoch):
        sizes = pieces[:, 2] - pieces[:, 1]
        assert sizes.sum() <= budget
        assert sizes.max() <= (longest or budget)
        for document, start, stop in pieces.tolist():
            seen[document][start:stop] += 1
            pieces_of[document] += 1
    assert all((count == 1).all() for count in seen)
    assert (pieces_of >= 1).all()  # documents of length 0, too


@given(lengths_strategy, st.integers(0, 30))
def test_batches_resume_anywhere(lengths, skip):
    batches = TokenBudgetBatches(np.array(lengths), 45, seed=7)

    def take(epoch, position, count):
        stream = BatchesFrom(batches, epoch=epoch, position=position)
        return [next(stream) for _ in range(count)]

    whole = take(0, 0, skip + 4)
    rest = take(whole[skip].epoch, whole[skip].position, 4)
    for one, other in zip(whole[skip:], rest, strict=True):
        assert (one.epoch, one.position, one.last) == (other.epoch, other.position, other.last)
        assert (one.pieces == other.pieces).all()
        assert one.num_batches == other.num_batches
        epoch_of_next = one.epoch + one.last
        assert one.num_batches == len(list(batches.epoch(epoch_of_next)))
    with pytest.raises(ValueError, match="cannot resume at batch 99"):
        take(0, 99, 1)


@given(lengths_strategy, st.integers(40, 90), st.integers(1, 20), st.none() | st.integers(0, 3))
def test_bucketed_batches_hold_every_document_once(lengths, budget, window, seed):
    batches = TokenBudgetBatches(np.array(lengths), budget, seed=seed, bucket_window=window)
    for epoch in (0, 1):
        found = list(batches.epoch(epoch))
        assert all((pieces[:, 2] - pieces[:, 1]).sum() <= budget for pieces in found)
        assert sorted(np.concatenate(found)[:, 0].tolist()) == list(range(len(lengths)))


def test_a_bucket_window_brings_similar_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 100, size=400)

    def spread(window):
        found = list(TokenBudgetBatches(lengths, 300, bucket_window=window).epoch(0))
        means = [lengths[pieces[:, 0]].mean() for pieces in found]
        return np.mean([lengths[pieces[:, 0]].std() for pieces in found]), means

    (mixed, _), (bucketed, means) = spread(0), spread(100)
    assert bucketed < mixed / 4
    assert means != sorted(means)  # batches of a window come in a random order


@given(lengths_strategy, st.integers(40, 60))
def test_ordered_packing_follows_the_rule_of_the_artifact(lengths, budget):
    def by_the_rule(order):
        batch, total = [], 0
        for document in [*order, None]:
            length = 0 if document is None else lengths[document]
            if document is None or total + length > budget:
                if total >= 0.75 * budget:
                    yield batch
                batch, total = [], 0
            batch.append(document)
            total += length

    order = np.random.default_rng([5, 0]).permutation(len(lengths)).tolist()
    batches = TokenBudgetBatches(np.array(lengths), budget, seed=5, packing="ordered")
    for epoch in (0, 3):  # one order for all
        found = [pieces[:, 0].tolist() for pieces in batches.epoch(epoch)]
        assert found == list(by_the_rule(order))


def test_orders_differ_by_epoch_and_seed():
    lengths = np.full(50, 3)

    def order(seed, epoch):
        batches = TokenBudgetBatches(lengths, 9, seed=seed)
        return np.concatenate(list(batches.epoch(epoch)))[:, 0].tolist()

    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(None, 0) == order(None, 5) == list(range(50))


@pytest.mark.parametrize(
    ("match", "lengths", "options"),
    [
        ("document 1 has 9 tokens, more than tokens_per_batch=8", [3, 9], {}),
        ("more than max_seqlen=4: raise", [3, 9], {"max_seqlen": 4}),
        ("max_seqlen must lie between 1 and tokens_per_batch=8, got 9", [3], {"max_seqlen": 9}),
        ("the dataset is empty", [], {}),
        ("got 'drop'", [3], {"over_long": "drop"}),
        ("must be 0 or more, got -1", [-1], {}),
        ("packing must be 'first_fit' or 'ordered', got 'tetris'", [3], {"packing": "tetris"}),
        ("0 for packing='ordered', got 4", [3], {"packing": "ordered", "bucket_window": 4}),
    ],
)
def test_batching_errors(match, lengths, options):
    with pytest.raises(ValueError, match=match):
        TokenBudgetBatches(np.array(lengths, dtype=np.int64), 8, **options)


# --------------------------------------------------------------------------- planning ahead


def same_batch(one, other):
    assert one.seqlens.tolist() == other.seqlens.tolist()
    assert one.weights == other.weights
    assert one.masks == other.masks


@pytest.mark.parametrize(
    "batch",
    [
        SequenceBatch([5, 0, 5, 1], "causal"),
        SequenceBatch([], "causal"),
        SequenceBatch([6], [AttnMask.from_ranges(np.array([[[0, 1], [3, 4]]] * 6))]),
        SequenceBatch([9, 4], {"g": "causal", "l": "full"}, weights={"g": 2, "l": 0.5}),
    ],
)
def test_batches_travel_unchanged(batch):
    same_batch(batch_from_wire(*batch_to_wire(batch)), batch)
    found = request_from_bytes(request_to_bytes(batch, SPEC, ONE, {"seed": 3}))
    same_batch(found[0], batch)
    assert found[1:] == (SPEC, ONE, {"seed": 3})


def test_damaged_requests_are_refused():
    message = bytearray(request_to_bytes(SequenceBatch([5]), SPEC, ONE, {}))
    message[-1] ^= 1
    with pytest.raises(WireError, match="damaged"):
        request_from_bytes(bytes(message))


def test_the_worker_needs_no_torch():
    code = "import dcp.data.worker, dcp.planner, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_children_find_what_this_process_finds(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    variables = child_environment(RANK="3")
    assert variables["RANK"] == "3"
    code = "import sys; print(*sys.path, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], env=variables, stdout=-1, text=True)
    assert next(p for p in found.stdout.split("\n") if p in sys.path) == str(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_pool_plans_and_passes_refusals_on(num_workers):
    batch, cluster = SequenceBatch([50, 7]), Cluster(devices_per_node=2)
    pool = PlanningPool(num_workers)
    options = {"strategy": "zigzag"}
    good = pool.submit(request_to_bytes(batch, SPEC, cluster, options))
    bad = pool.submit(request_to_bytes(batch, SPEC, cluster, {"strategy": "astrology"}))
    shares = [RankPlan.from_bytes(share) for share in good.result(60)]
    wanted = plan(batch, SPEC, cluster, **options)
    for rank in (0, 1):
        assert (shares[rank].token_indices == wanted.token_indices(rank)).all()
    with pytest.raises(PlanningFailed, match="'astrology' is not one of"):
        bad.result(60)
    pool.close()


def test_a_killed_worker_is_replaced_and_its_batch_planned_again():
    request = request_to_bytes(SequenceBatch([50, 7]), SPEC, ONE, {"strategy": "zigzag"})
    pool = PlanningPool(1)
    pool.submit(request).result(60)
    (pid,) = worker_pids(pool)
    os.kill(pid, signal.SIGSTOP)  # it cannot answer before it dies
    future = pool.submit(request)
    time.sleep(0.2)
    with pytest.warns(RuntimeWarning, match=f"died .pid {pid}, exit status -9") as caught:
        os.kill(pid, signal.SIGKILL)
        assert len(future.result(60)) == 1
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(pool.submit(request).result(60)) == 1
    assert worker_pids(pool) != [pid]
    pool.close()


def test_a_pool_whose_workers_die_in_a_row_is_lost(monkeypatch):
    dead = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr("dcp.data.pool._COMMAND", dead)
    pool = PlanningPool(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error says it all
        for _ in range(2):
            with pytest.raises(PoolLost, match=r"3 planning workers in a row.*exit status 3"):
                pool.submit(b"anything").result(60)
    pool.close()
