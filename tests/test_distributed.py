"""The same plans on real gloo processes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dcp import AttentionSpec, AttnMask, Cluster, LocalWorld, SequenceBatch, plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, DCPAttention
from tests.oracle import batch_mask, dense_attention, random_qkv

SEQLENS = [1, 0, 7, 129, 1000, 33]
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float64")
MASKS = {
    "causal": AttnMask.causal,
    "streaming": lambda n: AttnMask.streaming(n, sink=5, window=100),
    "shared_question": AttnMask.shared_question,
    "full": AttnMask.full,
}


def make_batch(mask, seqlens):
    return SequenceBatch(seqlens, [MASKS[mask](n) for n in seqlens])


def make_plan(world, mask, strategy, seqlens):
    cluster = Cluster(num_nodes=2 if world == 4 else 1, devices_per_node=2 if world == 4 else world)
    return plan(make_batch(mask, seqlens), SPEC, cluster, strategy=strategy, block_size=64)


def run_rank(message, seqlens, dtype):
    """On each rank: forward and backward of its share; returns out, lse, dq, dkv."""
    executor = AttentionExecutor()
    rank_plan = RankPlan.from_bytes(message[executor.rank])
    executor.prepare(rank_plan)
    q, k, v = (x.detach() for x in random_qkv(sum(seqlens), SPEC, dtype))
    mine = torch.from_numpy(rank_plan.token_indices)
    q = q[mine].requires_grad_()
    kv = torch.stack([k, v], dim=1)[mine].requires_grad_()
    out, lse = DCPAttention.apply_with_lse(executor, q, kv)
    grad_out = torch.randn(
        sum(seqlens), 4, 16, dtype=dtype, generator=torch.Generator().manual_seed(1)
    )
    out.backward(grad_out[mine])
    return [x.detach().numpy() for x in (out, lse, q.grad, kv.grad)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["hypergraph", "zigzag"])
@pytest.mark.parametrize("mask", MASKS)
def test_processes_equal_dense_attention(gloo_pool, world, strategy, mask):
    check_processes(gloo_pool, world, strategy, mask)


@pytest.mark.parametrize("mask", ["causal", "streaming"])
@pytest.mark.parametrize(
    "strategy", ["allgather", "ulysses", "double_ring", "a2a_p2p", "groups", "magi"]
)
def test_fixed_rules_equal_dense_attention(gloo_pool, strategy, mask):
    check_processes(gloo_pool, 3 if strategy == "groups" else 4, strategy, mask)


def check_processes(gloo_pool, world, strategy, mask):
    a_plan = make_plan(world, mask, strategy, SEQLENS)
    messages = [a_plan.rank_plan(rank).to_bytes() for rank in range(world)]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        shards = gloo_pool(world).run(run_rank, messages, SEQLENS, dtype)
        out, lse, grad_q, grad_kv = (
            a_plan.unshard([torch.from_numpy(s[i]) for s in shards]).double() for i in range(4)
        )
        q, k, v = random_qkv(sum(SEQLENS), SPEC, dtype)
        q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
        grad_out = torch.randn(q.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
        want, want_lse = dense_attention(q, k, v, batch_mask(make_batch(mask, SEQLENS)))
        want.backward(grad_out.double())
        for found, wanted in (
            (out, want),
            (lse, want_lse),
            (grad_q, q.grad),
            (grad_kv[:, 0], k.grad),
            (grad_kv[:, 1], v.grad),
        ):
            assert (found - wanted).abs().max() <= tolerance


@pytest.mark.parametrize("seqlens", [[2], [1, 1, 1], [0]])
def test_ranks_without_tokens_or_work(gloo_pool, seqlens):
    a_plan = make_plan(4, "causal", "hypergraph", seqlens)
    messages = [a_plan.rank_plan(rank).to_bytes() for rank in range(4)]
    shards = gloo_pool(4).run(run_rank, messages, seqlens, torch.float64)
    out = a_plan.unshard([torch.from_numpy(shard[0]) for shard in shards])
    q, k, v = (x.detach() for x in random_qkv(sum(seqlens), SPEC, torch.float64))
    assert torch.allclose(out, LocalWorld(a_plan).attention(q, k, v), rtol=0, atol=1e-12)


def groups_of_executors():
    """(rank, ranks) by each way to name this process group, and the refusal of two axes."""
    mesh = init_device_mesh("cpu", (2,))
    ways = (None, dist.group.WORLD, mesh, mesh.get_group())
    found = [(executor.rank, executor.num_ranks) for executor in map(AttentionExecutor, ways)]
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "cp"))
    one = AttentionExecutor(both["cp"])
    with pytest.raises(ValueError) as refusal:
        AttentionExecutor(both)
    return found, (one.rank, one.num_ranks), str(refusal.value)


def test_a_group_a_mesh_or_the_default_group(gloo_pool):
    for rank, (found, one, refusal) in enumerate(gloo_pool(2).run(groups_of_executors)):
        assert found == [(rank, 2)] * 4
        assert one == (0, 1)
        assert refusal.startswith("a mesh of 2 axes ('dp', 'cp') is not one group")


def count_bytes(message, seqlens):
    """Bytes that this rank really hands to the network in a forward pass."""
    from dcp.runtime import communicator

    executor = AttentionExecutor()
    executor.prepare(RankPlan.from_bytes(message[executor.rank]))
    sent = []
    launch = communicator.GroupCommunicator.launch

    def counting(self, sends, receives):
        sent.append(sum(m.numel() for m in sends.values()))
        return launch(self, sends, receives)

    communicator.GroupCommunicator.launch = counting
    try:
        local = executor.plan.num_local_tokens
        DCPAttention.apply(
            executor,
            torch.zeros(local, 4, 16, dtype=torch.float64),
            torch.zeros(local, 2, 2, 16, dtype=torch.float64),
        )
    finally:
        communicator.GroupCommunicator.launch = launch
    return sum(sent)


@pytest.mark.parametrize("strategy", ["hypergraph", "zigzag"])
def test_only_the_planned_bytes_travel(gloo_pool, strategy):
    a_plan = make_plan(3, "causal", strategy, SEQLENS)
    messages = [a_plan.rank_plan(rank).to_bytes() for rank in range(3)]
    sent = gloo_pool(3).run(count_bytes, messages, SEQLENS)
    assert sum(sent) == a_plan.stats.inter_node_bytes + a_plan.stats.intra_node_bytes
    assert max(sent) == a_plan.stats.max_rank_send_bytes
