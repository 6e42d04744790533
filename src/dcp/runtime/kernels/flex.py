"""Attention by torch's FlexAttention, forward only: its public interface takes no log-sum-exp of
other keys, which the backward pass of a block needs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from dcp.runtime.cells import Cell
from dcp.runtime.kernels import Options, QSide
from dcp.runtime.kernels.cellwise import CellKernel


class FlexKernel(CellKernel):
    name = "flex"

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        if options.needs_grad:
            return "it has no backward pass of a part of the keys"
        known = (torch.float32, torch.bfloat16, torch.float16)
        return None if dtype in known else f"it has no {dtype}"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor]:
        seen = cell.dense_mask(q.device)
        blocks = None
        if seen is not None:
            blocks = create_block_mask(
                lambda b, h, i, j: seen[i, j], None, None, len(q), len(k), device=q.device
            )
        cap = options.softcap or 1.0

        def bend(score: Tensor, *_: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

        out, extra = _flex(q.device.type)(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            score_mod=None if options.softcap is None else bend,
            block_mask=blocks,
            scale=options.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        return out[0].transpose(0, 1), extra.lse[0].transpose(0, 1)

    def gradients(
        self, q_side: QSide, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("flex was chosen for a call that needs gradients")


@lru_cache(maxsize=2)
def _flex(device_type: str) -> Any:
    """Compiled where there is a GPU; on the CPU the compiled form returns no log-sum-exp."""
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


KERNEL = FlexKernel()
