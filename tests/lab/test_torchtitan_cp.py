"""torchtitan's load balancers as placements of ours: what they deal, and that it computes right."""

import numpy as np
import torch

from dcp import Cluster, LocalWorld
from dcp.batch import AttentionSpec, SequenceBatch
from lab import torchtitan as peer
from tests.oracle import batch_mask, dense_attention

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32")
CLUSTER = Cluster(num_nodes=1, devices_per_node=2)
BATCH = SequenceBatch([300, 130, 0, 1, 150], "causal")  # 581 tokens: 5 chunks, filled up to 6


def test_chunks_are_dealt_by_the_key_blocks_that_they_see():
    blocks, chunk, num_chunks = peer._chunks(BATCH, SPEC, 2)
    dense = np.zeros((768, 768), dtype=bool)
    dense[:581, :581] = batch_mask(BATCH)
    seen = dense.reshape(6, 128, 6, 128).any(axis=(1, 3)).sum(axis=1)
    assert num_chunks == 6
    assert peer._visible(blocks, chunk, num_chunks).tolist() == seen.tolist() == [1, 2, 3, 2, 2, 0]
    assert peer._deal(seen, 2).tolist() == [0, 1, 0, 1, 0, 1]  # 2 | 1, back 4 | 3, then 0 | 5


def test_its_placement_computes_attention():
    made = peer.plan_ptrr(BATCH, SPEC, CLUSTER)
    assert made.stats.notes["padding_tokens"] == 768 - 581
    q, k, v = (torch.randn(581, heads, 8) for heads in (2, 1, 1))
    out = LocalWorld(made).attention(q, k, v)
    wanted = dense_attention(q.double(), k.double(), v.double(), batch_mask(BATCH))[0]
    assert (out.double() - wanted).abs().max() < 1e-5


def test_rows_name_every_planner():
    row = peer.compare("b", BATCH, "causal", CLUSTER)
    assert row.keys() == {"batch", "mask", *peer.PLANNERS}
    assert row["auto"]["seconds"] <= row[peer.HEADTAIL]["seconds"]
    assert row[peer.PTRR]["total_bytes"] > row["auto"]["total_bytes"]
    text = peer.as_text([dict(row, mask=mask) for mask in peer.MASKS])
    assert len(text.splitlines()) == 1 + 2 * len(peer.MASKS)
