"""Ranks that were given different things: every one of them says which, and none goes on."""

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dcp import AttentionSpec, Cluster, SequenceBatch, plan
from dcp.data.datasets import as_dataset
from dcp.data.identity import NUM_SAMPLED, sampled_documents
from dcp.runtime import AttentionExecutor, DCPAttention
from tests.loading import LENGTHS, documents_of, loader_of

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


def attention_on_each_rank(case):
    """The error of a call of attention that differs on one of three ranks."""
    rank = dist.get_rank()
    executor = AttentionExecutor()
    mask = "full" if rank == 1 and case == "plan" else "causal"
    made = plan(
        SequenceBatch([120], mask), SPEC, Cluster(devices_per_node=3), strategy="allgather",
        block_size=16,
    )  # fmt: skip
    executor.prepare(made)
    local = len(made.token_indices(rank))
    dtype = torch.float64 if case == "dtype" and rank == 2 else torch.float32
    q, kv = torch.randn(local, 4, 16, dtype=dtype), torch.randn(local, 2, 2, 16, dtype=dtype)
    q.requires_grad_(not (case == "grad" and rank == 1))
    scale = 0.5 if case == "scale" and rank == 0 else None
    try:
        DCPAttention.apply(executor, q, kv, scale=scale)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("none", None),
        ("plan", r"rank 1 has plan=\('[0-9a-f]{16}', 'allgather', 120\), rank 0 has plan=\("),
        ("dtype", r"rank 2 has dtype=torch\.float64, rank 0 has dtype=torch\.float32: all ranks"),
        ("grad", "rank 1 has needs_grad=False, rank 0 has needs_grad=True"),
        ("scale", r"rank 1 has scale=0\.25, rank 0 has scale=0\.5"),
    ],
)
def test_calls_of_attention_that_differ(gloo_pool, case, match):
    for error in gloo_pool(3).run(attention_on_each_rank, case):
        assert (error is None) == (match is None)
        assert match is None or re.match(match, error)


def test_a_fingerprint_is_that_of_the_work():
    def made(mask="causal", seqlen=120, **options):
        return plan(SequenceBatch([seqlen], mask), SPEC, Cluster(devices_per_node=3), **options)

    one = made(strategy="zigzag")
    assert {one.rank_plan(rank).fingerprint for rank in range(3)} == {one.fingerprint}
    assert made(strategy="zigzag").fingerprint == one.fingerprint
    others = [made(strategy="ring"), made("full", strategy="zigzag"), made(seqlen=121)]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4


def loader_on_each_rank(case):
    """The error of a loader that differs on rank 1 of two."""
    here = dist.get_rank() == 1
    documents, options = documents_of(LENGTHS * 2), {"group": dist.group.WORLD}
    options |= case.get("options", {}) if here else {}
    if here and case.get("reversed"):
        documents = documents[::-1]
    if here and case.get("other"):
        documents = [document + 1 for document in documents]
    if here and case.get("fewer"):
        documents = documents[:-1]
    try:
        with loader_of(documents, **options) as loader:
            state = loader.state_dict()
            loader.load_state_dict(state | {"position": 1 + (here and case.get("moved", 0))})
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ({}, None),
        ({"options": {"seed": 7}}, "rank 1 has seed=7, rank 0 has seed=0: the ranks of a loader"),
        ({"options": {"tokens_per_batch": 80}}, "rank 1 has tokens_per_batch=80, rank 0 has"),
        ({"options": {"packing": "ordered"}}, "rank 1 has packing='ordered', rank 0 has"),
        ({"options": {"plan_options": {}}}, "rank 1 has plan_options={}, rank 0 has"),
        ({"options": {"mask_fn": "full"}}, "rank 1 has mask='full', rank 0 has mask='causal'"),
        ({"fewer": True}, "rank 1 has num_documents=17, rank 0 has num_documents=18"),
        ({"other": True}, r"rank 1 has document \d+='\d+ tokens, checksum .*, rank 0 has document"),
        ({"reversed": True}, r"rank 1 has document \d+='"),
        ({"moved": 1}, "rank 1 has position=2, rank 0 has position=1"),
    ],
)
def test_loaders_that_differ(gloo_pool, case, match):
    for error in gloo_pool(2).run(loader_on_each_rank, case):
        assert (error is None) == (match is None)
        assert match is None or re.match(match, error)


def test_the_compared_documents_are_few():
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            Counted.read += 1
            return super().__getitem__(index)

    found = sampled_documents(as_dataset(Counted([np.arange(3)] * 1000)))
    assert len(found) == NUM_SAMPLED
    assert Counted.read == 2 * NUM_SAMPLED  # as it is, and as the loader understands it
    of_one = sampled_documents(as_dataset([np.arange(3)]))
    assert set(of_one.values()) - set(found.values()) == {None}
