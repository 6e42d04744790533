"""A kernel on a small batch against attention by the book, and pairs counted one by one."""

from __future__ import annotations

import numpy as np
import torch

from dcp import AttentionSpec, Cluster, LocalWorld, SequenceBatch, plan
from tests.masks_cases import MASKS
from tests.oracle import batch_mask, dense_attention

SEQLENS = [1, 0, 7, 70, 33]
NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")


def make_spec(heads=4, kv_heads=2, head_dim=16, dtype="float32"):
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)


def attend(attention, q, k, v, sink):
    """out, lse and gradients for a fixed gradient of out."""
    out, lse = attention(q, k, v, sink)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    inputs = [x for x in (q, k, v, sink) if x is not None]
    grads = torch.autograd.grad(out, inputs, grad_out)
    return [x.detach() for x in (out, lse, *grads)]


def inputs_of(spec, tokens, dtype, with_sink):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, h, spec.head_dim) for h in (spec.num_heads, *[spec.num_kv_heads] * 2)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    sink = torch.randn(spec.num_heads, generator=generator, dtype=torch.float64).to(dtype)
    return [x.requires_grad_() for x in tensors] + [sink.requires_grad_() if with_sink else None]


def errors(
    kernel, mask, world, heads=(4, 2), head_dim=16, dtype="float32", with_sink=False, **call
):
    """Largest error of each result of the kernel, and of dense attention in the same dtype."""
    batch = SequenceBatch(SEQLENS, [MASKS[mask](n) for n in SEQLENS])
    spec = make_spec(*heads, head_dim, dtype)
    cluster = Cluster(num_nodes=1, devices_per_node=world)
    a_plan = plan(batch, spec, cluster, strategy="hypergraph", block_size=24)
    dense_mask, to = batch_mask(batch), getattr(torch, dtype)

    def planned(q, k, v, sink):
        world = LocalWorld(a_plan, kernel=kernel)
        return world.attention(q, k, v, sink=sink, return_lse=True, **call)

    def by_the_book(q, k, v, sink):
        call_of = {name: call[name] for name in ("scale", "softcap") if name in call}
        return dense_attention(q, k, v, dense_mask, sink=sink, **call_of)

    tensors = inputs_of(spec, batch.num_tokens, to, with_sink)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    want = attend(by_the_book, *exact)
    return [
        [difference(a, b) for a, b in zip(attend(run, *tensors), want, strict=True)]
        for run in (planned, by_the_book)
    ]


def difference(found, want):
    """Largest absolute difference; infinite where NaN or infinities do not agree."""
    if torch.isnan(found).any() or not torch.equal(torch.isinf(found), torch.isinf(want)):
        return float("inf")
    gap = found.double() - want
    return torch.nan_to_num(gap, nan=0, posinf=0, neginf=0).abs().max().item()


def is_close(found, tolerance=1e-5):
    assert max(found[0]) <= tolerance, dict(zip(NAMES, found[0], strict=False))


def make_plan(mask, world):
    batch = SequenceBatch(SEQLENS, [MASKS[mask](n) for n in SEQLENS])
    cluster = Cluster(num_nodes=1, devices_per_node=world)
    spec = make_spec()
    return plan(batch, spec, cluster, strategy="hypergraph", block_size=24)


def count_pairs(bands, sizes):
    """How many of the slices hold each pair."""
    pairs = np.zeros(tuple(sizes), dtype=int)
    for q0, q1, k0, k1, lo, hi, *_ in np.asarray(bands).tolist():
        offset = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
        pairs[q0:q1, k0:k1] += (offset >= lo) & (offset <= hi)
    return pairs
