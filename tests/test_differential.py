"""Random batches, masks, heads, clusters and strategies against dense attention, in fp64."""

import numpy as np
import pytest
import torch

from dcp import AttentionSpec, AttnMask, Cluster, SequenceBatch, plan
from dcp.placement import StrategyError, strategy_names
from tests.masks_cases import MASKS
from tests.oracle import batch_mask, errors_against_dense
from tests.symbolic import check_plan

CASES, PARTS = 300, 10
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3), (4, 4))
LONG = 200


def mask_mod(rng, seqlen):
    picture = torch.from_numpy(rng.random((seqlen, seqlen)) < rng.random())
    return AttnMask.from_mask_mod(lambda b, h, q, kv: picture[q, kv], seqlen, seqlen)


def random_mask(rng, seqlen):
    name = str(rng.choice([*MASKS, "mask_mod"]))
    if name == "mask_mod" and seqlen <= 40:
        return mask_mod(rng, seqlen)
    return MASKS.get(name, AttnMask.causal)(seqlen)


def random_case(number):
    rng = np.random.default_rng(number)
    most = int(rng.choice([5, 30, 80, LONG]))
    seqlens = rng.integers(0, most + 1, rng.integers(1, 7)).tolist()
    seqlens[0] = max(seqlens[0], 1)  # a batch without any token has nothing to compare
    masks = [random_mask(rng, seqlen) for seqlen in seqlens]
    heads, kv_heads = HEADS[rng.integers(len(HEADS))]
    nodes = rng.integers(1, 4, rng.integers(1, 3)).tolist()
    nodes = [int(rng.integers(1, 7))] if rng.random() < 0.5 else nodes
    return {
        "seqlens": seqlens,
        "masks": masks,
        "spec": AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=4, dtype="float64"),
        "nodes": nodes,
        "strategy": ["auto", *strategy_names()][number % (len(strategy_names()) + 1)],
        "block_size": ["auto", 7, 16, 64][rng.integers(4)],
    }


@pytest.mark.parametrize("part", range(PARTS))
def test_random_cases_are_dense_attention(part):
    served = 0
    for number in range(part, CASES, PARTS):
        case = random_case(number)
        nodes = tuple(case["nodes"])
        cluster = Cluster(num_nodes=len(nodes), devices_per_node=nodes)
        batch = SequenceBatch(case["seqlens"], case["masks"])
        options = {"strategy": case["strategy"], "block_size": case["block_size"]}
        try:
            made = plan(batch, case["spec"], cluster, **options)
        except StrategyError:  # more ranks than heads: the next rule of the list
            made = plan(batch, case["spec"], cluster, strategy="zigzag")
        served += made.stats.strategy != "zigzag"
        errors = errors_against_dense(made, case["masks"], torch.float64)
        assert max(errors) <= 1e-10, (number, errors, case)
        if number % 5 == 0 and made.num_tokens <= LONG:
            check_plan(made, "default", batch_mask(batch).numpy(), seed=number)
    assert served > CASES // PARTS // 2
