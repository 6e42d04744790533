"""What kernels share that run a division cell by cell: the loop, and the merge of results."""

from __future__ import annotations

from abc import abstractmethod
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import pad

from dcp.program import MaskProgram
from dcp.runtime.cells import Cell, program_cells
from dcp.runtime.kernels import Kernel, Options, QSide, finite, merge, split_kv

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
        self, program: MaskProgram, device: torch.device, *, widest: int, dtype: torch.dtype
    ) -> dict[int, Work]:
        cells = program_cells(program)
        return {step: [cell.to(device) for cell in work] for step, work in cells.items()}

    def forward(
        self, work: Work, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:
        for cell in work:
            k, v = split_kv(kv[cell.k], options.head_dim)
            part_out, part_lse = self._attend_apart(q[cell.q], k, v, cell, options)
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
        grad_k, grad_v = split_kv(grad_kv, options.head_dim)
        for cell in work:
            k, v = split_kv(kv[cell.k], options.head_dim)
            sides = [side[cell.q] for side in q_side]
            dq, dk, dv = self._gradients_apart(sides, k, v, cell, options)
            # not +=, which would also copy the rows onto themselves
            grad_q[cell.out].add_(dq)
            grad_k[cell.dkv].add_(dk)
            grad_v[cell.dkv].add_(dv)

    # A kernel computes a masked cell whole, and its weight of 0 times NaN is NaN; and torch's for
    # the CPU loses a score of NaN among fewer than 16 keys. So rows that are not finite are set to
    # 0, and what meets them in a pair that counts is NaN afterwards.

    def _attend_apart(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor]:
        if _are_finite(q, k, v):
            return self.attend(q, k, v, cell, options)
        bad_q, bad_k = _not_finite(q), _not_finite(k, v)
        kept = _without(bad_q, q), _without(bad_k, k), _without(bad_k, v)
        out, lse = self.attend(*kept, cell, options)
        spoilt = (bad_q & (lse > -torch.inf)) | _spread(_meet(cell, bad_k), q.shape[1])
        return out.masked_fill(spoilt[..., None], torch.nan), lse.masked_fill(spoilt, torch.nan)

    def _gradients_apart(
        self, q_side: QSide, k: Tensor, v: Tensor, cell: Cell, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, grad_out, lse, delta = q_side
        if _are_finite(q, grad_out, finite(lse), delta, k, v):
            return self.gradients(q_side, k, v, cell, options)
        numbers = torch.stack([finite(lse), delta], dim=-1)
        bad_q, bad_k = _not_finite(q, grad_out, numbers), _not_finite(k, v)
        sides = [_without(bad_q, side) for side in q_side]
        grads = self.gradients(sides, _without(bad_k, k), _without(bad_k, v), cell, options)
        of_kv_head = bad_q.unflatten(1, (k.shape[1], -1)).any(dim=2)
        spoilt_q = bad_q | _spread(_meet(cell, bad_k), q.shape[1])
        spoilt_k = bad_k | _meet(cell, of_kv_head, by_key=True)
        dq, dk, dv = (
            grad.masked_fill(spoilt[..., None], torch.nan)
            for grad, spoilt in zip(grads, (spoilt_q, spoilt_k, spoilt_k), strict=True)
        )
        return dq, dk, dv


def _are_finite(*tensors: Tensor) -> bool:
    """Whether a sum says so, which is cheap; on a GPU the host would have to wait for it."""
    return tensors[0].device.type == "cpu" and all(isfinite(x.sum().item()) for x in tensors)


def _not_finite(*tensors: Tensor) -> Tensor:
    """Which rows have a number that is not finite in one of ``[rows, heads, …]``."""
    return torch.stack([~x.isfinite().all(dim=-1) for x in tensors]).any(dim=0)


def _without(bad: Tensor, rows: Tensor) -> Tensor:
    return rows.masked_fill(bad[..., None] if rows.dim() == 3 else bad, 0.0)


def _meet(cell: Cell, bad: Tensor, *, by_key: bool = False) -> Tensor:
    """Which queries see a bad key ``[keys, heads]``; ``by_key``: which keys a bad query sees."""
    mask = cell.dense_mask(bad.device)
    if mask is None:  # everything meets
        side = cell.k if by_key else cell.q
        return bad.any(dim=0).expand(side.stop - side.start, -1)
    return (mask.T if by_key else mask).float() @ bad.float() > 0


def _spread(of_kv_head: Tensor, heads: int) -> Tensor:
    return of_kv_head.repeat_interleave(heads // of_kv_head.shape[1], dim=1)


def output_of(delta: Tensor, grad_out: Tensor) -> Tensor:
    """The output along ``grad_out [rows, heads, value_dim]`` that has this delta: kernels that
    derive delta from an output are handed it, so that outputs need not travel."""
    wide = grad_out.to(delta.dtype)
    norm = wide.square().sum(dim=-1)
    return (wide * torch.where(norm > 0, delta / norm, 0.0)[..., None]).to(grad_out.dtype)


def one_width(*tensors: Tensor) -> list[Tensor]:
    """``[rows, heads, width]`` of each, the width that of the widest."""
    width = max(tensor.shape[-1] for tensor in tensors)
    return [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors]
