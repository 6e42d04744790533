"""Attention by torch's fused CPU kernel.

Its traps, all guarded here: rows that see nothing report lse 0, masks must be additive floats, its
causal flag is aligned to the top left, and empty inputs kill the process (a cell is never empty).
Half precision is computed in float32: more exact than the fused kernel's own, and faster backward.
It wants one width, so that the narrower of keys and values is padded by zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcp.runtime.cells import Cell
from dcp.runtime.kernels import Options, QSide, finite
from dcp.runtime.kernels.cellwise import CellKernel, one_width, output_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TorchCpuKernel(CellKernel):
    name = "torch_cpu"
    input_dtype = CellKernel.compute_dtype

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        if device.type != "cpu":
            return "it runs on the CPU only"
        if options.softcap is not None:
            return "it has no soft-cap"
        known = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return None if dtype in known else f"it has no {dtype}"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor]:
        bias, scale = _additive(cell, q), options.scale
        out, lse = _flash(*_heads_first(q, k, v), 0.0, cell.causal, attn_mask=bias, scale=scale)
        out, lse = out[0].transpose(0, 1)[..., : v.shape[-1]], lse[0].transpose(0, 1)
        if cell.mask is not None:
            lse = lse.masked_fill(~cell.mask.any(dim=1)[:, None], -torch.inf)
        return out, lse

    def gradients(
        self, q_side: QSide, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, grad_out, lse, delta = q_side
        grads = _flash_backward(
            *_heads_first(grad_out, q, k, v, output_of(delta, grad_out)),
            finite(lse).transpose(0, 1)[None].contiguous(),
            0.0,
            cell.causal,
            attn_mask=_additive(cell, q),
            scale=options.scale,
        )
        grad_q, grad_k, grad_v = (
            grad[0].transpose(0, 1)[..., : like.shape[-1]]
            for grad, like in zip(grads, (q, k, v), strict=True)
        )
        return grad_q, grad_k, grad_v


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """``[1, heads, rows, width]`` of each, the width that of the widest."""
    return [x.transpose(0, 1)[None] for x in one_width(*tensors)]


def _additive(cell: Cell, like: Tensor) -> Tensor | None:
    """The cell's mask as a float bias."""
    if cell.mask is None:
        return None
    bias = torch.zeros(cell.mask.shape, dtype=like.dtype)
    return bias.masked_fill_(~cell.mask, -torch.inf)


KERNEL = TorchCpuKernel()
