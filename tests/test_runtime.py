"""Planned attention in one process against dense attention in float64."""

import numpy as np
import pytest
import torch

from dcp import AttentionSpec, AttnMask, Cluster, LocalWorld, SequenceBatch, plan
from dcp.placement import strategy_names
from dcp.runtime import AttentionExecutor, DCPAttention
from tests.oracle import batch_mask, dense_attention, errors_against_dense, random_qkv

SEQLENS = [1, 0, 7, 129, 300, 33]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

MASKS = {
    "full": AttnMask.full,
    "causal": AttnMask.causal,
    "sliding_window": lambda n: AttnMask.sliding_window(n, 20),
    "streaming": lambda n: AttnMask.streaming(n, sink=3, window=21),
    "causal_blockwise": lambda n: AttnMask.causal_blockwise(n, block=16, local_blocks=2),
    "shared_question": AttnMask.shared_question,
    "prefix_lm": lambda n: AttnMask.prefix_lm(n, 30),
    "documents": lambda n: AttnMask.documents([n // 3, 0, n - n // 3]),
    "modality": lambda n: AttnMask.modality([n // 4, n - n // 4 - n // 3], n // 3),
    "modality_alone": lambda n: AttnMask.modality([n // 4, n - n // 4 - n // 3], n // 3, True),
    "slices": lambda n: AttnMask.from_slices(
        n, n, [(0, n // 2, 0, n // 2, "inv_causal"), (n // 2, n, 0, n, "bi_causal")]
    ),
    "ranges": lambda n: AttnMask.from_ranges(
        np.sort(np.random.default_rng(n).integers(0, n + 1, (n, 3, 2)), axis=2)
    ),
}


def make_plan(masks, world, *, heads=(4, 2), strategy="hypergraph", seqlens=SEQLENS, **options):
    nodes = 2 if world % 2 == 0 else 1
    return plan(
        SequenceBatch(seqlens, masks),
        AttentionSpec(num_heads=heads[0], num_kv_heads=heads[1], head_dim=16, dtype="float32"),
        Cluster(num_nodes=nodes, devices_per_node=world // nodes),
        strategy=strategy,
        **({"block_size": 48} | options),
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_world_equals_dense(mask, world):
    masks = [MASKS[mask](n) for n in SEQLENS]
    for dtype, tolerance in TOLERANCE.items():
        errors = errors_against_dense(make_plan(masks, world), masks, dtype)
        assert max(errors) <= tolerance, f"out, lse, dq, dk, dv: {errors}"


@pytest.mark.parametrize("heads", [(8, 2), (8, 8), (8, 1)])
@pytest.mark.parametrize("strategy", strategy_names())
def test_every_strategy_and_head_count_equals_dense(strategy, heads):
    masks = [AttnMask.streaming(n, sink=3, window=40) for n in SEQLENS]
    for world in (1, 3, 4, 8):
        a_plan = make_plan(masks, world, heads=heads, strategy=strategy)
        assert max(errors_against_dense(a_plan, masks, torch.float64)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_dense(dtype):
    masks = [AttnMask.causal(n) for n in SEQLENS]
    a_plan = make_plan(masks, 4)
    ours = errors_against_dense(a_plan, masks, dtype)
    q, k, v = random_qkv(a_plan.num_tokens, a_plan.spec, dtype)
    mask = batch_mask(SequenceBatch(SEQLENS, masks))
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for to in (dtype, torch.float64):
        inputs = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        out, lse = dense_attention(*inputs, mask)
        results.append((out, lse, *torch.autograd.grad(out, inputs, grad_out.to(to))))
    theirs = [(a.double() - b).abs().max().item() for a, b in zip(*results, strict=True)]
    for name, our, their in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert our <= 2 * their, (name, our, their)


def test_dense_kernel_agrees():
    masks = [AttnMask.streaming(n, sink=3, window=21) for n in SEQLENS]
    a_plan = make_plan(masks, 3)
    q, k, v = (x.detach() for x in random_qkv(a_plan.num_tokens, a_plan.spec, torch.float64))
    fused = LocalWorld(a_plan, kernel="torch_cpu").attention(q, k, v)
    dense = LocalWorld(a_plan, kernel="dense").attention(q, k, v)
    assert (fused - dense).abs().max() < 1e-12


def test_non_contiguous_inputs_and_a_scale_of_ones_own():
    masks = [AttnMask.causal(n) for n in SEQLENS]
    a_plan = make_plan(masks, 4)
    tokens = a_plan.num_tokens
    packed = torch.randn(16, 8, tokens, dtype=torch.float64).permute(2, 1, 0)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    out = LocalWorld(a_plan).attention(q, k, v, scale=0.3)
    want, _ = dense_attention(q, k, v, batch_mask(SequenceBatch(SEQLENS, masks)), 0.3)
    assert (out - want).abs().max() < 1e-10


def test_two_masks_share_owners():
    masks = {"global": "causal", "local": [AttnMask.sliding_window(n, 16) for n in SEQLENS]}
    a_plan = make_plan(masks, 4)
    q, k, v = (x.detach() for x in random_qkv(a_plan.num_tokens, a_plan.spec, torch.float64))
    batch = SequenceBatch(SEQLENS, masks)
    for name in masks:
        out = LocalWorld(a_plan).attention(q, k, v, mask=name)
        want, _ = dense_attention(q, k, v, batch_mask(batch, name))
        assert (out - want).abs().max() < 1e-10


@pytest.mark.parametrize("seqlens", [[], [0, 0], [1], [1] * 5, [3, 2]])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("strategy", ["hypergraph", "zigzag"])
def test_degenerate_batches(seqlens, world, strategy):
    a_plan = make_plan("causal", world, seqlens=seqlens, strategy=strategy)
    if sum(seqlens):
        assert max(errors_against_dense(a_plan, "causal", torch.float64)) <= 1e-10
    assert sum(len(a_plan.token_indices(r)) for r in range(world)) == sum(seqlens)


def test_a_mask_without_pairs_gives_zeros():
    masks = [AttnMask.from_slices(40, 40, [])]
    a_plan = make_plan(masks, 2, seqlens=[40])
    q, k, v = random_qkv(40, a_plan.spec, torch.float32)
    out, lse = LocalWorld(a_plan).attention(q, k, v, return_lse=True)
    out.sum().backward()
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert (q.grad == 0).all()


def test_mistakes_are_named():
    a_plan = make_plan("causal", 1)
    executor = AttentionExecutor()
    q, kv = torch.zeros(a_plan.num_tokens, 4, 16), torch.zeros(a_plan.num_tokens, 2, 2, 16)
    with pytest.raises(ValueError, match="the executor has no plan yet"):
        DCPAttention.apply(executor, q, kv)
    executor.prepare(a_plan)
    with pytest.raises(ValueError, match=r"q has shape \(470, 3, 16\)"):
        DCPAttention.apply(executor, q[:, :3], kv)
    with pytest.raises(ValueError, match="no mask 'other'"):
        DCPAttention.apply(executor, q, kv, "other")
    with pytest.raises(ValueError, match=r"no kernel for torch.int64 on cpu"):
        DCPAttention.apply(executor, q.long(), kv.long())
    with pytest.raises(ValueError, match="kernel 'fast' is not one of"):
        LocalWorld(a_plan, kernel="fast").attention(q, kv[:, 0], kv[:, 1])
    with pytest.raises(ValueError, match="rank 0 of 2"):
        executor.prepare(make_plan("causal", 2).rank_plan(0))


def test_activation_checkpointing_and_a_new_plan_between_passes():
    from torch.utils.checkpoint import checkpoint

    a_plan, other = make_plan("causal", 1), make_plan("full", 1)
    executor = AttentionExecutor()
    executor.prepare(a_plan)
    q, k, v = random_qkv(a_plan.num_tokens, a_plan.spec, torch.float64)
    kv = torch.stack([k, v], 1).detach().requires_grad_()
    out = DCPAttention.apply(executor, q, kv)
    again = checkpoint(lambda a, b: DCPAttention.apply(executor, a, b), q, kv, use_reentrant=False)
    grads = torch.autograd.grad(again.square().sum(), (q, kv))
    executor.prepare(other)  # the call above keeps the plan it began with
    for a, b in zip(torch.autograd.grad(out.square().sum(), (q, kv)), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
