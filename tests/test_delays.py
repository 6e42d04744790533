"""No order of events changes a bit: ranks that dawdle before any instruction, at random."""

import time
from unittest import mock

import numpy as np
import pytest
import torch

from dcp import Cluster, plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, passes
from tests.batches import make_batch
from tests.kernel_cases import make_spec

MOST_SECONDS = 1e-3  # that a rank dawdles before an instruction
PLANS, ROUNDS = 10, 20  # 200 steps


def step(executor, rank_plan, seed):
    """Output and gradients of one forward and backward pass, as bytes."""
    executor.prepare(rank_plan)
    generator = torch.Generator().manual_seed(seed)
    tokens = rank_plan.num_local_tokens
    shapes = ((tokens, 4, 16), (tokens, 2, 2, 16))
    q, kv = (torch.randn(s, generator=generator, requires_grad=True) for s in shapes)
    out = executor.attention(q, kv)
    out.square().sum().backward()
    return [x.detach().numpy().tobytes() for x in (out, q.grad, kv.grad)]


def dawdle(messages):
    """How many of the steps differ from those in which nobody dawdled."""
    executor = AttentionExecutor()
    plans = [RankPlan.from_bytes(each[executor.rank]) for each in messages]
    wanted = [step(executor, each, seed) for seed, each in enumerate(plans)]
    random = np.random.default_rng(executor.rank)

    def late_clock():
        time.sleep(random.uniform(0, MOST_SECONDS) * (random.random() < 0.5))
        return time.monotonic()

    different = 0
    with mock.patch.object(passes, "perf_counter", late_clock):  # looked at before each instruction
        for _ in range(ROUNDS):
            for seed, each in enumerate(plans):
                different += step(executor, each, seed) != wanted[seed]
    return different


@pytest.mark.parametrize(("nodes", "devices"), [(1, 3), (2, 2)])
def test_late_ranks_change_no_bit(gloo_pool, nodes, devices):
    random = np.random.default_rng(nodes)
    cluster, world = Cluster(num_nodes=nodes, devices_per_node=devices), nodes * devices
    masks = ("causal", "streaming", "shared_question", "causal_blockwise")
    messages = []
    for number in range(PLANS):
        batch = make_batch(random.integers(1, 200, 5).tolist(), masks[number % 4])
        options = {"strategy": "bisection", "block_size": 16, "num_divisions": 4}
        made = plan(batch, make_spec(), cluster, **options)
        messages.append([made.rank_plan(rank).to_bytes() for rank in range(world)])
    assert gloo_pool(world).run(dawdle, messages) == [0] * world
