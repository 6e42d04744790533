"""A rank's plan made ready to run: instructions derived and kernels' tables built, once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.program import Instruction, Launch, RankPlan
from dcp.runtime.kernels import Kernel
from dcp.runtime.rows import Rows, place_rows
from dcp.tables import Move

# To or from a peer: its rows of each buffer, in the order of buffers.
Message = tuple[int, list[tuple[int, Rows]]]
Runs = tuple[np.ndarray, np.ndarray]  # first row, rows
_numbers = count()


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
        self.number = next(_numbers)  # its name in compiled code
        self.is_compared = False  # with the other ranks'
        self.copied: torch.cuda.Event | None = None  # when tables made ahead are on the device
        self._instructions: dict[tuple[str, bool, torch.device], list[Instruction | Exchange]] = {}
        self._work: dict[tuple[str, str, torch.device, torch.dtype], dict[int, Any]] = {}

    def use_here(self) -> None:
        """Let the current stream use tables that were made ahead, on another stream: it waits for
        them, the host does not, and their memory is not given away before it is done with them."""
        if self.copied is None:
            return
        self.copied.wait()
        for tensor in tensors_in((self._instructions, self._work)):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def instructions(
        self, mask: str | None, device: torch.device, *, backward: bool
    ) -> list[Instruction | Exchange]:
        """The program of one pass, its launches as :class:`Exchange`."""
        key = mask or next(iter(self.plan.masks)), backward, device
        if key not in self._instructions:
            program = list(self.plan.mask_program(mask).instructions(backward=backward))
            exchanges = iter(_exchanges([i for i in program if isinstance(i, Launch)], device))
            self._instructions[key] = [
                next(exchanges) if isinstance(each, Launch) else each for each in program
            ]
        return self._instructions[key]

    def work(
        self, mask: str | None, kernel: Kernel, device: torch.device, dtype: torch.dtype
    ) -> dict[int, Any]:
        """What ``kernel`` needs for each division, by step."""
        key = mask or next(iter(self.plan.masks)), kernel.name, device, dtype
        if key not in self._work:
            program, spec = self.plan.mask_program(mask), self.plan.spec
            widest = max(spec.head_dim, spec.value_dim)
            self._work[key] = kernel.prepare(program, device, widest=widest, dtype=dtype)
        return self._work[key]


def tensors_in(held: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples, dicts and dataclasses."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from tensors_in(list(held.values()))
    elif isinstance(held, list | tuple):
        for each in held:
            yield from tensors_in(each)
    elif is_dataclass(held):
        yield from tensors_in([getattr(held, field.name) for field in fields(held)])


def _exchanges(launches: list[Launch], device: torch.device) -> list[Exchange]:
    """All launches of a program, in their order."""
    sides = [_parts(moves) for launch in launches for moves in (launch.sends, launch.receives)]
    placed = iter(place_rows([runs for side in sides for *_, runs in side], device))
    messages = iter([_messages(side, placed) for side in sides])
    return [Exchange(launch.step, next(messages), next(messages)) for launch in launches]


def _parts(moves: np.ndarray) -> list[tuple[int, int, Runs]]:
    """Moves (peer, buffer, row, rows), sorted by peer and buffer, as (peer, buffer, runs)."""
    key = moves[:, [Move.PEER, Move.BUFFER]]
    start = np.flatnonzero(np.append(True, (key[1:] != key[:-1]).any(axis=1)))
    pieces = np.split(moves, start[1:]) if len(moves) else []
    return [
        (int(p[0, Move.PEER]), int(p[0, Move.BUFFER]), (p[:, Move.ROW], p[:, Move.ROWS]))
        for p in pieces
    ]


def _messages(parts: list[tuple[int, int, Runs]], placed: Iterator[Rows]) -> list[Message]:
    messages: dict[int, list[tuple[int, Rows]]] = {}
    for peer, buffer, _ in parts:
        messages.setdefault(peer, []).append((buffer, next(placed)))
    return list(messages.items())
