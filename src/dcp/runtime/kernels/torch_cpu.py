"""Attention by torch's fused CPU kernel.

Its traps, all guarded here: rows that see nothing report lse 0, masks must be additive floats, its
causal flag is aligned to the top left, and empty inputs kill the process (a cell is never empty).
Half precision is computed in float32: more exact than the fused kernel's own, and faster backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcp.runtime.cells import Cell
from dcp.runtime.kernels import Options, cellwise
from dcp.runtime.kernels.cellwise import WRITES_ONCE, compute_dtype, delta, finite, prepare

__all__ = [
    "NAME",
    "WRITES_ONCE",
    "backward",
    "compute_dtype",
    "delta",
    "forward",
    "input_dtype",
    "prepare",
    "supports",
]

NAME = "torch_cpu"
input_dtype = compute_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports(device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
    """None, or why this kernel cannot serve."""
    if device.type != "cpu":
        return "it runs on the CPU only"
    if options.softcap is not None:
        return "it has no soft-cap"
    known = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return None if dtype in known else f"it has no {dtype}"


def forward(
    work: cellwise.Work, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
) -> None:
    """See :mod:`dcp.runtime.kernels`."""
    cellwise.run_forward(_forward, work, q, kv, out, lse, options)


def backward(
    work: cellwise.Work,
    q_side: tuple[Tensor, Tensor, Tensor, Tensor],
    kv: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
    options: Options,
) -> None:
    """See :mod:`dcp.runtime.kernels`."""
    cellwise.run_backward(_backward, work, q_side, kv, grad_q, grad_kv, options)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cell: Cell, options: Options
) -> tuple[Tensor, Tensor]:
    bias = _additive(cell, q)
    out, lse = _flash(*_heads_first(q, k, v), 0.0, cell.causal, attn_mask=bias, scale=options.scale)
    out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    if cell.mask is not None:
        lse = lse.masked_fill(~cell.mask.any(dim=1)[:, None], -torch.inf)
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cell: Cell,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernel derives delta from an output; it is handed the one along ``grad_out`` that
    has this delta, so that outputs need not travel."""
    norm = grad_out.square().sum(dim=-1)
    out = grad_out * torch.where(norm > 0, delta / norm, 0.0)[..., None]
    grads = _flash_backward(
        *_heads_first(grad_out, q, k, v, out),
        finite(lse).transpose(0, 1)[None].contiguous(),
        0.0,
        cell.causal,
        attn_mask=_additive(cell, q),
        scale=options.scale,
    )
    grad_q, grad_k, grad_v = (grad[0].transpose(0, 1) for grad in grads)
    return grad_q, grad_k, grad_v


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def _additive(cell: Cell, like: Tensor) -> Tensor | None:
    """The cell's mask as a float bias."""
    if cell.mask is None:
        return None
    bias = torch.zeros(cell.mask.shape, dtype=like.dtype)
    return bias.masked_fill_(~cell.mask, -torch.inf)
