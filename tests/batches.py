"""Batches that several tests plan."""

from __future__ import annotations

from dcp import AttentionSpec, SequenceBatch
from dcp.masks import named_mask

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")
# Lengths of real documents, 131,072 tokens a batch; and short ones that need no other rank.
REFERENCE = {
    "ldc-131k-0": [
        774, 2476, 9797, 1083, 2198, 3068, 2861, 413, 2914, 19960, 255, 9436, 3109, 993, 52255,
        8157, 430, 2907, 6175, 1811,
    ],
    "longalign-131k-1": [
        20215, 18296, 15151, 6967, 13696, 23583, 5108, 9932, 3364, 5322, 3517, 5921,
    ],
    "ldc-131k-1": [
        7241, 2353, 7073, 22495, 943, 3526, 1297, 3146, 438, 1090, 1937, 10010, 14488, 357, 789,
        6861, 130, 1297, 2246, 17133, 7312, 1591, 1495, 1786, 14038,
    ],
    "short-131k": [1024] * 128,
}  # fmt: skip


def make_batch(seqlens: list[int], mask: str) -> SequenceBatch:
    """A batch under one named mask."""
    return SequenceBatch(seqlens, [named_mask(mask, seqlen) for seqlen in seqlens])
