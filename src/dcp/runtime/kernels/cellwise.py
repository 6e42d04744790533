"""What kernels share that run a division cell by cell: the loop, and the merge of results."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from dcp.program import MaskProgram
from dcp.runtime.cells import Cell, program_cells
from dcp.runtime.kernels import Kernel, Options, QSide

Work = list[Cell]


class CellKernel(Kernel):
    """A kernel that computes one cell at a time; cells of one division meet in their rows."""

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor]:
        """out and lse of one cell."""

    @abstractmethod
    def gradients(
        self, q_side: QSide, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of one cell."""

    def prepare(
        self, program: MaskProgram, device: torch.device, *, head_dim: int, dtype: torch.dtype
    ) -> dict[int, Work]:
        cells = program_cells(program)
        return {step: [cell.to(device) for cell in work] for step, work in cells.items()}

    def forward(
        self, work: Work, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:
        for cell in work:
            k, v = kv[cell.k].unbind(1)
            part_out, part_lse = self.attend(q[cell.q], k, v, cell, options)
            if cell.first:
                out[cell.out], lse[cell.out] = part_out, part_lse
            else:
                merge(out[cell.out], lse[cell.out], part_out, part_lse)

    def backward(
        self,
        work: Work,
        q_side: QSide,
        kv: Tensor,
        grad_q: Tensor,
        grad_kv: Tensor,
        options: Options,
    ) -> None:
        for cell in work:
            k, v = kv[cell.k].unbind(1)
            sides = [side[cell.q] for side in q_side]
            dq, dk, dv = self.gradients(sides, k, v, cell, options)
            grad_q[cell.out] += dq
            grad_kv[cell.dkv, 0] += dk
            grad_kv[cell.dkv, 1] += dv


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
