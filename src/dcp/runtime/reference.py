"""Attention by the book, every score written out: what results are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from dcp.runtime.kernels.cellwise import finite


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out ``[queries, heads, value_dim]`` and lse ``[queries, heads]``, in the tensors' dtype.

    Differentiable. Rows that see nothing are 0 and -inf.

    Args:
        q, k, v: ``[queries, heads, head_dim]``, ``[keys, kv_heads, …]``.
        mask: bool ``[queries, keys]``, the pairs that count.
        scale: of the scores; None: ``head_dim ** -0.5``.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(dim=-1)
    weights = torch.exp(scores - finite(lse)[..., None]).masked_fill(~mask, 0.0)
    return torch.einsum("hqk,khd->qhd", weights, v), lse.T


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of ``wanted``, in float64; infinite for NaN."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return error if error == error else float("inf")
