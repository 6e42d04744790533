"""Independent references: masks of whole batches and dense attention."""

from __future__ import annotations

import torch
from torch import Tensor

from dcp import LocalWorld, SequenceBatch


def batch_mask(batch: SequenceBatch, name: str | None = None) -> Tensor:
    """Boolean ``[tokens, tokens]``: which pairs of the whole batch count."""
    dense = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    offsets = batch.offsets.tolist()
    for start, mask in zip(offsets, batch.masks[name or batch.mask_names[0]], strict=False):
        rows = slice(start, start + mask.q_len)
        dense[rows, rows] = torch.from_numpy(mask.to_dense())
    return dense


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by the book: out ``[tokens, heads, d]``, lse ``[tokens, heads]``"""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", weights, v), lse.transpose(0, 1)


def random_qkv(tokens: int, spec, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v with gradients wanted."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, spec.head_dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    ]


def errors_against_dense(a_plan, masks, dtype, *, reference_dtype=torch.float64):
    """Largest absolute error of out, lse, dq, dk, dv."""
    batch = SequenceBatch(a_plan.seqlens.tolist(), masks)
    q, k, v = random_qkv(a_plan.num_tokens, a_plan.spec, dtype)
    out, lse = LocalWorld(a_plan).attention(q, k, v, return_lse=True)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = (out, lse, *torch.autograd.grad(out, (q, k, v), grad_out))

    exact = [x.detach().to(reference_dtype).requires_grad_() for x in (q, k, v)]
    want_out, want_lse = dense_attention(*exact, batch_mask(batch))
    want = (want_out, want_lse, *torch.autograd.grad(want_out, exact, grad_out.to(reference_dtype)))
    return [
        torch.nan_to_num(a.double() - b.double(), posinf=0, neginf=0, nan=0).abs().max().item()
        if torch.equal(torch.isinf(a), torch.isinf(b)) and not torch.isnan(a).any()
        else float("inf")
        for a, b in zip(found, want, strict=True)
    ]
