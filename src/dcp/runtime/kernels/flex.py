"""Attention by torch's FlexAttention, forward only: its public interface takes no log-sum-exp of
other keys, which the backward pass of a block needs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from dcp.runtime.cells import Cell
from dcp.runtime.kernels import Options, cellwise
from dcp.runtime.kernels.cellwise import WRITES_ONCE, compute_dtype, delta, prepare

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

NAME = "flex"


def supports(device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
    """None, or why this kernel cannot serve."""
    if options.needs_grad:
        return "it has no backward pass of a part of the keys"
    known = (torch.float32, torch.bfloat16, torch.float16)
    return None if dtype in known else f"it has no {dtype}"


def input_dtype(dtype: torch.dtype) -> torch.dtype:
    """Inputs stay as they are."""
    return dtype


def forward(
    work: cellwise.Work, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
) -> None:
    """See :mod:`dcp.runtime.kernels`."""
    cellwise.run_forward(_forward, work, q, kv, out, lse, options)


def backward(*_: object) -> None:
    raise AssertionError("flex was chosen for a call that needs gradients")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cell: Cell, options: Options
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


@lru_cache(maxsize=2)
def _flex(device_type: str):
    """Compiled where there is a GPU; on the CPU the compiled form returns no log-sum-exp."""
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention
