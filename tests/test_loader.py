"""The loader: what each rank gets, in which order, and what it reads meanwhile."""

import json
import re
import threading

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from dcp import AttnMask, Cluster
from dcp.data import ModalityMasks, PlanningError
from dcp.data.datasets import as_dataset
from dcp.data.exchange import Exchange
from dcp.data.identity import sampled_documents
from tests.loading import DOCUMENTS, AtOnce, documents_of, drain, loader_of


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


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resuming_counts_what_was_yielded(prefetch):
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
    first = loader_of(look_ahead=3, planning_pool=AtOnce(), prefetch=prefetch)
    assert take(first, 5) == whole[:5]
    state = json.loads(json.dumps(first.state_dict()))
    second = loader_of(num_workers=1)
    take(second, 2)  # what it planned ahead is forgotten
    second.load_state_dict(state)
    assert take(second, 7) == whole[5:]
    assert take(first, 7) == whole[5:]
    with pytest.raises(ValueError, match="cannot resume at batch 99 of epoch 1: it has"):
        first.load_state_dict(state | {"epoch": 1, "position": 99})
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        loader_of(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="document_tokens was"):
        loader_of([*DOCUMENTS[:-1], np.arange(2)]).load_state_dict(state)
    for loader in (first, second):
        loader.close()


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
    with pytest.raises(ValueError, match="prefetch must be 0 or more, got -1"):
        loader_of(prefetch=-1)
    with pytest.raises(ValueError, match="vector of integers"):
        loader_of([np.zeros((2, 3))])
    with pytest.raises(ValueError, match="no batch of epoch 0 is 75% full: lower tokens_per_batch"):
        loader_of(DOCUMENTS[:1], packing="ordered")


def test_the_length_is_the_number_of_batches_of_the_coming_epoch():
    loader = loader_of()
    for _ in range(4):
        assert len(loader) == len(drain(loader))
    next(iter(loader))
    rest = len(loader) - 1
    assert len(drain(loader)) == rest


# --------------------------------------------------------------------------- reading ahead


class Watched:
    """A dataset that notes which thread reads a document, and keeps a background thread waiting."""

    def __init__(self, *, broken=None):
        self.lengths = np.array([len(document) for document in DOCUMENTS])
        self.broken, self.read = broken, []
        self.gate, self.was_read = threading.Event(), [threading.Event() for _ in DOCUMENTS]

    def __len__(self):
        return len(DOCUMENTS)

    def __getitem__(self, index):
        here = threading.current_thread() is threading.main_thread()
        assert here or self.gate.wait(60)
        self.read.append((index, here))
        self.was_read[index].set()
        if index == self.broken:
            raise OSError(f"document {index} cannot be read")
        return DOCUMENTS[index]

    def num_loss_tokens(self, index, start, stop):
        return max(min(stop, int(self.lengths[index]) - 1) - start, 0)


def documents_by_batch():
    return [sorted({token // 1000 for token in tokens}) for tokens, *_ in drain(loader_of())]


def test_the_next_documents_are_read_while_the_consumer_computes():
    first, second, third, *_ = documents_by_batch()
    dataset = Watched()
    with loader_of(dataset, planning_pool=AtOnce()) as loader:
        batches = iter(loader)
        next(batches)
        assert sorted(dataset.read) == [(index, True) for index in first]  # and waited for no more
        dataset.gate.set()
        assert all(dataset.was_read[index].wait(60) for index in second)
        batch, _ = next(batches)
        assert sorted({token // 1000 for token in batch.tokens.tolist()}) == second
        assert all(dataset.was_read[index].wait(60) for index in third)
    read = [index for index, here in dataset.read if not here]
    assert [sorted(read[: len(second)]), sorted(read[len(second) :])] == [second, third]


def test_without_prefetch_the_caller_reads():
    dataset = Watched()
    with loader_of(dataset, planning_pool=AtOnce(), prefetch=0) as loader:
        assert drain(loader) == drain(loader_of())
    assert all(here for _, here in dataset.read)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_document_that_cannot_be_read_fails_its_own_batch(prefetch):
    batches = documents_by_batch()
    broken = batches[2][0]
    dataset = Watched(broken=broken)
    dataset.gate.set()
    with loader_of(dataset, planning_pool=AtOnce(), prefetch=prefetch) as loader:
        count = 0
        with pytest.raises(OSError, match=f"document {broken} cannot be read"):
            for count, _ in enumerate(loader, start=1):
                assert loader.state_dict()["position"] == count
        assert count == min(i for i, documents in enumerate(batches) if broken in documents)


def test_closing_ends_the_reading_thread():
    before = set(threading.enumerate())
    dataset = Watched()
    dataset.gate.set()
    loader = loader_of(dataset, planning_pool=AtOnce())
    next(iter(loader))
    assert set(threading.enumerate()) - before
    loader.close()
    assert set(threading.enumerate()) <= before


# --------------------------------------------------------------------------- several ranks


def on_each_rank(planning_ranks, num_epochs, as_mesh):
    """The epochs as one rank sees them, with its token counts, and how long it took them to be."""
    group = init_device_mesh("cpu", (3,)) if as_mesh else None
    options = {"group": group, "num_workers": 1}
    with loader_of(planning_ranks=planning_ranks, **options) as loader:
        sizes, epochs = [], []
        for _ in range(num_epochs):
            sizes.append(len(loader))
            epochs.append(drain(loader))
        return epochs, sizes, loader.state_dict()["epoch"]


@pytest.mark.parametrize(("planning_ranks", "as_mesh"), [((0,), False), ((2, 0), True)])
def test_ranks_share_each_batch_out(gloo_pool, planning_ranks, as_mesh):
    results = gloo_pool(3).run(on_each_rank, planning_ranks, 2, as_mesh)
    alone = loader_of()
    assert [epoch for *_, epoch in results] == [2, 2, 2]
    for epochs, sizes, _ in results:
        assert sizes == [len(epoch) for epoch in epochs]
    for epoch in range(2):
        shares = [epochs[epoch] for epochs, *_ in results]
        for wanted, *parts in zip(drain(alone), *shares, strict=True):
            rows = sorted(zip(*wanted[:3], strict=True))
            found = sorted(row for part in parts for row in zip(*part[:3], strict=True))
            assert found == rows
            assert {part[3] for part in parts} == {wanted[3]}


def withdrawn_on_each_rank():
    """Rank 1 takes a batch back that rank 0 has seen and reads only then."""
    group, key = torch.distributed.group.WORLD, "0/0/1"
    exchange = Exchange(group, None, timeout_seconds=20)
    if exchange.rank == 1:
        exchange.publish(key, [b"share", b""])
    torch.distributed.barrier()
    seen = exchange.num_published([key])
    torch.distributed.barrier()
    if exchange.rank == 1:
        exchange.withdraw(key)
    torch.distributed.barrier()
    if exchange.rank == 0:
        with pytest.raises(PlanningError, match="rank 1 has closed its loader"):
            exchange.fetch(key, 1)
    return seen


def test_a_batch_taken_back_is_not_waited_for(gloo_pool):
    assert gloo_pool(2).run(withdrawn_on_each_rank)[0] == 1


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
    documents = documents_of([30] * 12)  # a rank looks at 8 of them beforehand, to compare
    seen = {int(name.split()[1]) for name in sampled_documents(as_dataset(documents))}
    unseen = min(set(range(12)) - seen)
    documents[unseen] = np.arange(90 + rank)
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
    assert re.search(
        r"document \d has 91 tokens on rank 1 and 90 where it was planned", messages[1]
    )
