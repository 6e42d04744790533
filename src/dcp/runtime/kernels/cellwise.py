"""What kernels share that run a division cell by cell: the loop, and the merge of results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dcp.program import MaskProgram
from dcp.runtime.cells import Cell, program_cells
from dcp.runtime.kernels import Options

Work = list[Cell]
# (q, k, v, cell, options) -> out, lse; (grad_out, q, k, v, lse, delta, cell, options) -> dq, dk, dv
CellForward = Callable[..., tuple[Tensor, Tensor]]
CellBackward = Callable[..., tuple[Tensor, Tensor, Tensor]]


WRITES_ONCE = False  # cells of one division meet in their rows


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products run in: float32 for half precision, else the dtype itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare(
    program: MaskProgram, device: torch.device, *, head_dim: int, dtype: torch.dtype
) -> dict[int, Work]:
    """Every division's cells, their masks on the device."""
    if device.type == "cpu":
        return program_cells(program)
    cells = program_cells(program)
    return {step: [cell.to(device) for cell in work] for step, work in cells.items()}


def run_forward(
    attend: CellForward,
    work: Work,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> None:
    """Fold each cell's partial result into ``out`` and ``lse``."""
    for cell in work:
        k, v = kv[cell.k].unbind(1)
        part_out, part_lse = attend(q[cell.q], k, v, cell, options)
        if cell.first:
            out[cell.out], lse[cell.out] = part_out, part_lse
        else:
            merge(out[cell.out], lse[cell.out], part_out, part_lse)


def run_backward(
    attend: CellBackward,
    work: Work,
    q_side: tuple[Tensor, Tensor, Tensor, Tensor],
    kv: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
    options: Options,
) -> None:
    """Add each cell's gradients."""
    for cell in work:
        k, v = kv[cell.k].unbind(1)
        q, grad_out, lse, delta = (side[cell.q] for side in q_side)
        dq, dk, dv = attend(grad_out, q, k, v, lse, delta, cell, options)
        grad_q[cell.out] += dq
        grad_kv[cell.dkv, 0] += dk
        grad_kv[cell.dkv, 1] += dv


def delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """See :mod:`dcp.runtime.kernels`."""
    dtype = compute_dtype(out.dtype)
    return (grad_out.to(dtype) * out.to(dtype)).sum(dim=-1)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Fold another partial result into ``out [rows, heads, d]`` and ``lse [rows, heads]``.

    Rows that see nothing in either part (lse = -inf in both) stay 0 and -inf.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = finite(total)
    out.mul_(torch.exp(lse - safe)[..., None])
    out.addcmul_(other_out, torch.exp(other_lse - safe)[..., None])
    lse.copy_(total)


def finite(lse: Tensor) -> Tensor:
    """Rows that see nothing get 0, so that exp(-inf - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
