"""A rank's plan made ready to run: instructions derived and kernels' tables built, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.program import (
    Attention,
    Copy,
    Instruction,
    Launch,
    MaskProgram,
    RankPlan,
    Reduce,
    Wait,
)
from dcp.received import own_rows
from dcp.runtime.kernels import Kernel
from dcp.runtime.rows import Rows, place_rows
from dcp.tables import Arrival, Item, Move, Reset
from dcp.transfers import DKV, OUT

# To or from a peer: its rows of each buffer, in the order of buffers.
Message = tuple[int, list[tuple[int, Rows]]]
_numbers = count()


@dataclass(frozen=True)
class Exchange:
    """A :class:`dcp.program.Launch` whose rows are grouped by peer and buffer, and joined."""

    step: int
    sends: list[Message]
    receives: list[Message]


@dataclass(frozen=True)
class Division:
    """A :class:`dcp.program.Attention`: the rows to clear first, by buffer, joined."""

    step: int
    clears: list[tuple[int, Rows]]


@dataclass(frozen=True)
class Fold:
    """A :class:`dcp.program.Reduce`: the rows that each message's partial results go to, by peer
    and buffer, joined. They are taken from the message as it arrived, and need no rows to land in.
    """

    step: int
    targets: list[tuple[int, int, Rows]]


Step = Copy | Exchange | Wait | Division | Fold


class PreparedPlan:
    """One rank's plan with what its calls share, kept as long as the plan is in use."""

    def __init__(self, plan: RankPlan) -> None:
        self.plan = plan
        self.number = next(_numbers)  # its name in compiled code
        self.is_compared = False  # with the other ranks'
        self.copied: torch.cuda.Event | None = None  # when tables made ahead are on the device
        self._instructions: dict[tuple[str, bool, torch.device], list[Step]] = {}
        self._num_rows: dict[str, list[int]] = {}
        self._work: dict[tuple[str, Kernel, torch.device, torch.dtype], dict[int, Any]] = {}

    def use_here(self) -> None:
        """Let the current stream use tables that were made ahead, on another stream: it waits for
        them, the host does not, and their memory is not given away before it is done with them."""
        if self.copied is None:
            return
        self.copied.wait()
        for tensor in tensors_in((self._instructions, self._work)):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def instructions(self, mask: str | None, device: torch.device, *, backward: bool) -> list[Step]:
        """The program of one pass, its rows joined and on the device."""
        key = mask or next(iter(self.plan.masks)), backward, device
        if key not in self._instructions:
            program = self.plan.mask_program(mask).instructions(backward=backward)
            self._instructions[key] = _place(list(program), device)
        return self._instructions[key]

    def num_rows(self, mask: str | None) -> list[int]:
        """Rows of each buffer; where partial results land in the plan, they are never put."""
        key = mask or next(iter(self.plan.masks))
        if key not in self._num_rows:
            self._num_rows[key] = _num_rows(self.plan, self.plan.mask_program(mask))
        return self._num_rows[key]

    def work(
        self, mask: str | None, kernel: Kernel, device: torch.device, dtype: torch.dtype
    ) -> dict[int, Any]:
        """What ``kernel`` needs for each division, by step."""
        key = mask or next(iter(self.plan.masks)), kernel, device, dtype
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


def _num_rows(plan: RankPlan, program: MaskProgram) -> list[int]:
    tokens, keys = np.array([plan.num_local_tokens]), np.array([plan.num_local_keys])
    own = own_rows(tokens, keys, plan.num_head_groups, plan.spec)[0]
    items, sums, resets = program.items, program.reduces, program.resets
    rows: list[int] = program.buffer_rows.tolist()
    for buffer, columns in (
        (OUT, [Item.OUT_ROW, Item.Q_ROWS]),
        (DKV, [Item.DKV_ROW, Item.KV_ROWS]),
    ):
        cleared = resets[resets[:, Reset.BUFFER] == buffer][:, [Reset.ROW, Reset.ROWS]]
        summed = sums[sums[:, Arrival.BUFFER] == buffer][:, [Arrival.TARGET, Arrival.ROWS]]
        ends = np.concatenate([items[:, columns], cleared, summed]).sum(axis=1)
        rows[buffer] = max(int(own[buffer]), int(ends.max(initial=0)))
    return rows


def _place(program: list[Instruction], device: torch.device) -> list[Step]:
    """All instructions, in their order, with one copy of row numbers to the device for each kind
    of rows."""
    kept: list[Step] = [each for each in program if isinstance(each, Copy | Wait)]
    launches = [each for each in program if isinstance(each, Launch)]
    reduces = [each for each in program if isinstance(each, Reduce)]
    attentions = [each for each in program if isinstance(each, Attention)]
    placed: dict[type, Iterator[Step]] = {
        Launch: iter(_exchanges(launches, device)),
        Reduce: iter(_folds(reduces, launches, device)),
        Attention: iter(_divisions(attentions, device)),
    }
    others = iter(kept)
    return [next(placed.get(type(each), others)) for each in program]


def _exchanges(launches: list[Launch], device: torch.device) -> list[Exchange]:
    """All launches of a program, in their order."""
    columns = (Move.PEER, Move.BUFFER)
    sides = [
        _grouped(moves, columns) for launch in launches for moves in (launch.sends, launch.receives)
    ]
    runs = [(part[:, Move.ROW], part[:, Move.ROWS]) for side in sides for part in side]
    placed = iter(place_rows(runs, device))
    messages = iter([_messages(side, placed) for side in sides])
    return [Exchange(launch.step, next(messages), next(messages)) for launch in launches]


def _messages(parts: list[np.ndarray], placed: Iterator[Rows]) -> list[Message]:
    messages: dict[int, list[tuple[int, Rows]]] = {}
    for part in parts:
        peer, buffer = part[0, [Move.PEER, Move.BUFFER]].tolist()
        messages.setdefault(peer, []).append((buffer, next(placed)))
    return list(messages.items())


def _divisions(attentions: list[Attention], device: torch.device) -> list[Division]:
    """All divisions of a program, in their order."""
    clears = [_grouped(each.resets, (Reset.BUFFER,)) for each in attentions]
    runs = [(part[:, Reset.ROW], part[:, Reset.ROWS]) for parts in clears for part in parts]
    placed = iter(place_rows(runs, device))
    return [
        Division(each.step, [(int(part[0, Reset.BUFFER]), next(placed)) for part in parts])
        for each, parts in zip(attentions, clears, strict=True)
    ]


def _folds(reduces: list[Reduce], launches: list[Launch], device: torch.device) -> list[Fold]:
    """All reduces of a program, in their order: each follows its communication."""
    arrived = {launch.step - 1: launch.receives for launch in launches}
    parts = [
        [
            part
            for part in _grouped(arrived[each.step], (Move.PEER, Move.BUFFER))
            if part[0, Move.BUFFER] >= OUT
        ]
        for each in reduces
    ]
    runs = [
        (_targets(part, each.rows), part[:, Move.ROWS])
        for each, messages in zip(reduces, parts, strict=True)
        for part in messages
    ]
    placed = iter(place_rows(runs, device))
    return [
        Fold(
            each.step,
            [(*part[0, [Move.PEER, Move.BUFFER]].tolist(), next(placed)) for part in messages],
        )
        for each, messages in zip(reduces, parts, strict=True)
    ]


def _targets(moves: np.ndarray, arrivals: np.ndarray) -> np.ndarray:
    """First rows of what each of a message's partial results is added to."""
    there = arrivals[arrivals[:, Arrival.BUFFER] == moves[0, Move.BUFFER]]
    there = there[np.argsort(there[:, Arrival.SOURCE])]
    at = np.searchsorted(there[:, Arrival.SOURCE], moves[:, Move.ROW])
    assert (there[at, Arrival.SOURCE] == moves[:, Move.ROW]).all()
    targets: np.ndarray = there[at, Arrival.TARGET]
    return targets


def _grouped(table: np.ndarray, columns: Sequence[int]) -> list[np.ndarray]:
    """Rows of a table, sorted by ``columns``, that agree in them."""
    if not len(table):
        return []
    key = table[:, list(columns)]
    return np.split(table, np.flatnonzero((key[1:] != key[:-1]).any(axis=1)) + 1)
