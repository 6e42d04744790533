"""Attention by plain matrix products: any device, any floating dtype, memory for every pair."""

from __future__ import annotations

import torch
from torch import Tensor

from dcp.runtime.cells import Cell
from dcp.runtime.kernels import Options, QSide, finite
from dcp.runtime.kernels.cellwise import CellKernel


class DenseKernel(CellKernel):
    name = "dense"
    input_dtype = CellKernel.compute_dtype

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point dtype"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor]:
        scores, _ = _scores(q, k, cell, options)
        lse = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - finite(lse)[..., None])
        return torch.einsum("hqk,khd->qhd", weights, _repeat(v, q)), lse.transpose(0, 1)

    def gradients(
        self, q_side: QSide, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, grad_out, lse, delta = q_side
        scores, slope = _scores(q, k, cell, options)
        weights = torch.exp(scores - finite(lse).transpose(0, 1)[..., None])
        grad_v = torch.einsum("hqk,qhd->khd", weights, grad_out)
        grad_weights = torch.einsum("qhd,khd->hqk", grad_out, _repeat(v, q))
        grad_scores = weights * (grad_weights - delta.transpose(0, 1)[..., None]) * options.scale
        if slope is not None:
            grad_scores *= slope
        grad_q = torch.einsum("hqk,khd->qhd", grad_scores, _repeat(k, q))
        grad_k = torch.einsum("hqk,qhd->khd", grad_scores, q)
        return grad_q, _fold(grad_k, k), _fold(grad_v, k)


def _scores(q: Tensor, k: Tensor, cell: Cell, options: Options) -> tuple[Tensor, Tensor | None]:
    """Scores ``[heads, queries, keys]``, and the soft-cap's slope where there is one."""
    scores, slope = torch.einsum("qhd,khd->hqk", q, _repeat(k, q)) * options.scale, None
    if options.softcap is not None:
        bent = torch.tanh(scores / options.softcap)
        scores, slope = bent * options.softcap, 1 - bent.square()
    mask = cell.dense_mask(q.device)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf), slope


def _repeat(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _fold(grad: Tensor, k: Tensor) -> Tensor:
    """Sum the gradients of the query heads that share a KV head."""
    return grad.unflatten(1, (k.shape[1], -1)).sum(dim=2)


KERNEL = DenseKernel()
