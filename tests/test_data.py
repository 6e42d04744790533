"""Documents, batches, planning ahead, the loader."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp import AttentionSpec, AttnMask, Cluster, DCPDataLoader, SequenceBatch, plan
from dcp.data import (
    ByteTokenizer,
    ModalityMasks,
    PlanningError,
    PlanningPool,
    PoolLost,
    TokenBudgetBatches,
    TokenDataset,
    open_documents,
)
from dcp.data.batching import batches_from
from dcp.data.messages import (
    PlanningFailed,
    batch_from_wire,
    batch_to_wire,
    request_from_bytes,
    request_to_bytes,
)
from dcp.program import RankPlan
from dcp.wire import WireError

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
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
        stream = batches_from(batches, epoch=epoch, position=position)
        return [next(stream) for _ in range(count)]

    whole = take(0, 0, skip + 4)
    rest = take(whole[skip].epoch, whole[skip].position, 4)
    for one, other in zip(whole[skip:], rest, strict=True):
        assert (one.epoch, one.position, one.last) == (other.epoch, other.position, other.last)
        assert (one.pieces == other.pieces).all()
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
    (pid,) = pool.worker_pids
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
    assert pool.worker_pids != [pid]
    pool.close()


def test_a_pool_whose_workers_die_in_a_row_is_lost(monkeypatch):
    from dcp.data import planning

    dead = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(planning, "_COMMAND", dead)
    pool = PlanningPool(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error says it all
        for _ in range(2):
            with pytest.raises(PoolLost, match=r"3 planning workers in a row.*exit status 3"):
                pool.submit(b"anything").result(60)
    pool.close()


# --------------------------------------------------------------------------- the loader

DOCUMENTS = [np.arange(n) + 1000 * i for i, n in enumerate([5, 70, 0, 33, 1, 12, 64, 3, 28])]


def loader_of(dataset=DOCUMENTS, mask_fn="causal", **options):
    options = {"tokens_per_batch": 64, "over_long": "split", "num_workers": 0} | options
    return DCPDataLoader(dataset, mask_fn, spec=SPEC, **options)


def drain(loader):
    """Tokens, labels and positions of an epoch, batch by batch, and the counts."""
    return [
        (b.tokens.tolist(), b.labels.tolist(), b.positions.tolist(), b.num_loss_tokens)
        for b, _ in loader
    ]


def test_one_rank_sees_each_token_once_with_the_next_as_its_label():
    epoch = drain(loader_of())
    tokens = [t for batch in epoch for t in batch[0]]
    assert sorted(tokens) == sorted(np.concatenate(DOCUMENTS).tolist())
    for ids, labels, positions, num_loss_tokens in epoch:
        assert sum(label != -100 for label in labels) == num_loss_tokens
        for token, label, position in zip(ids, labels, positions, strict=True):
            document, offset = divmod(token, 1000)
            last = offset == len(DOCUMENTS[document]) - 1
            assert label == (-100 if last else token + 1)
            assert position == offset % 64  # also in the second piece of a split document


def test_own_labels_are_shifted_and_counted():
    samples = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 7, 8]}, {"input_ids": [5, 6]}]
    ((tokens, labels, _, count),) = drain(loader_of(samples, seed=None))
    assert tokens == [1, 2, 3, 4, 5, 6]
    assert labels == [-100, 7, 8, -100, 6, -100]
    assert count == 3


def test_mask_fn_sees_lengths_and_samples():
    calls = []

    def mask_fn(seqlens, samples):
        calls.append((seqlens, [len(sample) for sample in samples]))
        return ["full" if seqlen < 20 else AttnMask.sliding_window(seqlen, 5) for seqlen in seqlens]

    loader = loader_of(mask_fn=mask_fn, look_ahead=1)
    batch, _ = next(iter(loader))
    assert calls[0] == (batch.seqlens.tolist(), batch.seqlens.tolist())
    masks = loader.sequence_batch(0, 0).masks["default"]
    assert [mask.area for mask in masks] == [
        n * n if n < 20 else AttnMask.sliding_window(n, 5).area for n in batch.seqlens.tolist()
    ]


def visible(text_lengths, image_size, own_only):
    """The modality mask by its rule, token by token."""
    image = np.concatenate(
        [np.repeat([-1 - i, i], [n, image_size]) for i, n in enumerate(text_lengths)]
    )[: len(text_lengths) * image_size + sum(text_lengths) - image_size]
    dense = np.zeros((len(image), len(image)), dtype=bool)
    for q, of in enumerate(image):
        for k, other in enumerate(image):
            same = of >= 0 and of == other
            dense[q, k] = same or (k <= q and not (own_only and of >= 0))
    return dense


@pytest.mark.parametrize("own_only", [False, True])
def test_image_sizes_and_text_lengths_make_the_modality_mask(own_only):
    shapes = [([3, 0, 4], 5), ([2, 1], 8), ([7], 4), (None, None)]
    samples = []
    for text_lengths, image_size in shapes:
        total = (
            6 if text_lengths is None else sum(text_lengths) + (len(text_lengths) - 1) * image_size
        )
        samples.append(
            {"input_ids": np.arange(total), "text_lengths": text_lengths, "image_size": image_size}
        )
    loader = loader_of(samples, ModalityMasks(own_only), seed=None, over_long="raise")
    batch, _ = next(iter(loader))
    assert batch.seqlens.tolist() == [len(sample["input_ids"]) for sample in samples]
    masks = loader.sequence_batch(0, 0).masks["default"]
    for mask, (text_lengths, image_size) in zip(masks[:3], shapes[:3], strict=True):
        assert (mask.to_dense() == visible(text_lengths, image_size, own_only)).all()
    assert masks[3] == AttnMask.causal(6)


@pytest.mark.parametrize(
    ("match", "sample"),
    [
        (r"text_lengths \[3, 3\] with images of 5 tokens make 11 tokens, the sample has 12",
         {"input_ids": np.arange(12), "text_lengths": [3, 3], "image_size": 5}),
        ("needs 'text_lengths'", {"input_ids": np.arange(12), "image_size": 5}),
        ("must be a mapping, got ndarray of 12 tokens", np.arange(12)),
    ],
)  # fmt: skip
def test_multimodal_mistakes(match, sample):
    with pytest.raises(ValueError, match=match):
        next(iter(loader_of([sample], ModalityMasks())))


def test_resuming_counts_what_was_yielded():
    def take(loader, count):
        found = []
        while len(found) < count:
            for batch, _ in loader:
                found.append((batch.epoch, batch.index, batch.tokens.tolist()))
                if len(found) == count:
                    break
        return found

    whole = take(loader_of(), 12)
    assert {epoch for epoch, *_ in whole} >= {0, 1, 2}
    first = loader_of(look_ahead=3)
    assert take(first, 5) == whole[:5]
    state = json.loads(json.dumps(first.state_dict()))
    second = loader_of(num_workers=1)
    take(second, 2)  # what it planned ahead is forgotten
    second.load_state_dict(state)
    assert take(second, 7) == whole[5:]
    assert take(first, 7) == whole[5:]
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        loader_of(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="document_tokens was"):
        loader_of([*DOCUMENTS[:-1], np.arange(2)]).load_state_dict(state)
    second.close()


def test_loader_errors():
    with pytest.raises(ValueError, match="the dataset is empty"):
        loader_of([])
    with pytest.raises(ValueError, match="document 1 has 70 tokens"):
        loader_of(over_long="raise")
    with pytest.raises(ValueError, match="4 devices and attention 1 ranks"):
        loader_of(cluster=Cluster(devices_per_node=4))
    with pytest.raises(ValueError, match=r"mask 'default'.*is 3 x 3"):
        next(iter(loader_of(mask_fn=lambda seqlens, samples: [AttnMask.full(3)] * len(seqlens))))
    with pytest.raises(ValueError, match="look_ahead must be 1"):
        loader_of(look_ahead=0)
    with pytest.raises(ValueError, match="vector of integers"):
        loader_of([np.zeros((2, 3))])
    with pytest.raises(ValueError, match="no batch of epoch 0 is 75% full: lower tokens_per_batch"):
        next(iter(loader_of(DOCUMENTS[:1], packing="ordered")))


def on_each_rank(planning_ranks, num_epochs):
    """The epochs as one rank sees them, with its token counts."""
    options = {"group": torch.distributed.group.WORLD, "num_workers": 1}
    with loader_of(planning_ranks=planning_ranks, **options) as loader:
        epochs = [drain(loader) for _ in range(num_epochs)]
        return epochs, loader.state_dict()["epoch"]


@pytest.mark.parametrize("planning_ranks", [(0,), (2, 0)])
def test_ranks_share_each_batch_out(gloo_pool, planning_ranks):
    results = gloo_pool(3).run(on_each_rank, planning_ranks, 2)
    alone = loader_of()
    assert [epoch for _, epoch in results] == [2, 2, 2]
    for epoch in range(2):
        shares = [epochs[epoch] for epochs, _ in results]
        for wanted, *parts in zip(drain(alone), *shares, strict=True):
            rows = sorted(zip(*wanted[:3], strict=True))
            found = sorted(row for part in parts for row in zip(*part[:3], strict=True))
            assert found == rows
            assert {part[3] for part in parts} == {wanted[3]}


def failing_on_each_rank():
    group = torch.distributed.group.WORLD
    with loader_of(mask_fn=lambda seqlens, samples: ["oval"] * len(seqlens), group=group) as loader:
        try:
            next(iter(loader))
        except (ValueError, PlanningError) as error:
            return str(error)
    return None


def test_all_ranks_hear_of_an_error_in_planning(gloo_pool):
    messages = gloo_pool(3).run(failing_on_each_rank)
    assert all("mask 'oval' is not one of" in message for message in messages)


def unequal_on_each_rank():
    rank = torch.distributed.get_rank()
    documents = [np.arange(90 + rank)]
    with loader_of(
        documents,
        group=torch.distributed.group.WORLD,
        over_long="split",
        plan_options={"strategy": "zigzag"},
    ) as loader:
        try:
            list(loader)
        except ValueError as error:
            return str(error)
    return None


def test_ranks_with_other_data_are_found_out(gloo_pool):
    messages = gloo_pool(2).run(unequal_on_each_rank)
    assert messages[0] is None
    assert "document 0 has 91 tokens on rank 1 and 90 where it was planned" in messages[1]
