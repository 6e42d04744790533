"""A rank's plan made ready to run: instructions derived and kernels' tables built, once."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dcp.program import Instruction, Launch, RankPlan

# Per peer, in the order of peers: (buffer, runs of rows as slices) in the order of buffers.
Message = tuple[int, list[tuple[int, list[slice]]]]


@dataclass(frozen=True)
class Exchange:
    """A :class:`dcp.program.Launch` whose rows are grouped by peer and buffer, and joined."""

    step: int
    sends: list[Message]
    receives: list[Message]


class PreparedPlan:
    """One rank's plan with what its calls share, kept as long as the plan is in use."""

    def __init__(self, plan: RankPlan) -> None:
        self.plan = plan
        self._instructions: dict[tuple[str, bool], list[Instruction | Exchange]] = {}
        self._work: dict[tuple[str, str, torch.device, torch.dtype], dict[int, Any]] = {}

    def instructions(self, mask: str | None, *, backward: bool) -> list[Instruction | Exchange]:
        """The program of one pass, its launches as :class:`Exchange`."""
        key = mask or next(iter(self.plan.masks)), backward
        if key not in self._instructions:
            program = self.plan.mask_program(mask)
            self._instructions[key] = [
                _exchange(each) if isinstance(each, Launch) else each
                for each in program.instructions(backward=backward)
            ]
        return self._instructions[key]

    def work(
        self, mask: str | None, kernel: ModuleType, device: torch.device, dtype: torch.dtype
    ) -> dict[int, Any]:
        """What ``kernel`` needs for each division, by step."""
        key = mask or next(iter(self.plan.masks)), kernel.NAME, device, dtype
        if key not in self._work:
            program, head_dim = self.plan.mask_program(mask), self.plan.spec.head_dim
            self._work[key] = kernel.prepare(program, device, head_dim=head_dim, dtype=dtype)
        return self._work[key]


def _exchange(launch: Launch) -> Exchange:
    return Exchange(launch.step, _messages(launch.sends), _messages(launch.receives))


def _messages(moves: np.ndarray) -> list[Message]:
    """Moves (peer, buffer, row, rows), sorted by peer and buffer, as messages.

    Rows that follow each other are one run: it changes how many copies fill a message, not the
    order of its bytes, so that either side may join what the other cannot.
    """
    messages: list[Message] = []
    for peer in np.unique(moves[:, 0]).tolist():
        mine = moves[moves[:, 0] == peer]
        parts = []
        for buffer in np.unique(mine[:, 1]).tolist():
            row, rows = mine[mine[:, 1] == buffer][:, 2:].T
            parts.append((buffer, _joined(row, rows)))
        messages.append((peer, parts))
    return messages


def _joined(row: np.ndarray, rows: np.ndarray) -> list[slice]:
    """Runs of rows in the order given, neighbours joined."""
    start = np.flatnonzero(np.append(True, row[1:] != row[:-1] + rows[:-1]))
    length = np.add.reduceat(rows, start)
    return [slice(a, a + n) for a, n in zip(row[start].tolist(), length.tolist(), strict=True)]
