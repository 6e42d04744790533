"""The integer tables that plans and programs are made of: their columns, and how they travel.

A column has one number everywhere: all ranks' tables hold every column, one rank's program drops
what follows the step, and an instruction drops the step, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar, get_type_hints

import numpy as np

from dcp.wire import WireError, exactly


class Item(IntEnum):
    """Attention of one query piece on one key piece: rows of the buffers, slices of its tile."""

    Q_ROW, KV_ROW, OUT_ROW, DKV_ROW, Q_ROWS, KV_ROWS, GROUP = range(7)
    FIRST_SLICE, END_SLICE, STEP, RANK, TILE = range(7, 12)


class Move(IntEnum):
    """Rows to or from a peer; the step is the number of the communication."""

    PEER, BUFFER, ROW, ROWS, STEP, RANK = range(6)


class Arrival(IntEnum):
    """Arrived partial rows that are merged into the rank's own."""

    BUFFER, SOURCE, TARGET, ROWS, STEP, RANK = range(6)


class Reset(IntEnum):
    """Partial result rows to clear before the division that first adds to them."""

    BUFFER, ROW, ROWS, STEP, RANK = range(5)


Columns = type[Item] | type[Move] | type[Arrival] | type[Reset]
#: The columns of each table of :class:`Tables`, all sorted by (rank, step).
COLUMNS: dict[str, Columns] = {
    "items": Item, "sends": Move, "receives": Move, "reduces": Arrival, "resets": Reset,
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Tables:
    """The work of one mask; every array int64 and read-only.

    Attributes:
        num_steps: steps of the schedule: its divisions, and more where results travel on.
        gradients_hop: partial key and value gradients are summed from rank to rank, and travel in
            full precision, so that each rank does not round the sum once more.
        first_key, last_key, is_band: what the mask is in all, see :meth:`dcp.SequenceBatch.band`.
        items, sends, receives, reduces, resets: see :data:`COLUMNS`. Both sides of a communication
            list its moves in the same order.
        buffer_rows: rows of the four buffers, ``[…, 4]``.
        slices: mask slices in coordinates of their tile, ``[n, 6]``.
    """

    num_steps: int
    gradients_hop: bool
    first_key: int
    last_key: int
    is_band: bool
    items: np.ndarray
    sends: np.ndarray
    receives: np.ndarray
    reduces: np.ndarray
    resets: np.ndarray
    buffer_rows: np.ndarray
    slices: np.ndarray

    def __post_init__(self) -> None:
        freeze(self)


AnyTables = TypeVar("AnyTables", bound=Tables)


def table(columns: Columns, **values: np.ndarray) -> np.ndarray:
    """A table of the columns named, in their order: ``table(Reset, buffer=…, row=…, …)``."""
    return np.stack([values[column.name.lower()] for column in columns], axis=1)


def freeze(holder: object) -> None:
    """Make the arrays among an object's attributes read-only."""
    for value in vars(holder).values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)


def to_parts(masks: Mapping[str, Tables]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The counts of each mask's tables by name, and their arrays: what :mod:`dcp.wire` packs."""
    counts: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for index, (name, tables) in enumerate(masks.items()):
        values = vars(tables)
        arrays |= {f"{index}.{k}": v for k, v in values.items() if isinstance(v, np.ndarray)}
        counts[name] = {k: v for k, v in values.items() if isinstance(v, int)}
    return counts, arrays


def from_parts(
    kind: type[AnyTables],
    counts: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    *,
    others: Iterable[str],
) -> dict[str, AnyTables]:
    """Inverse of :func:`to_parts`; ``others`` are the names of the arrays that are no tables'.

    Raises :class:`dcp.wire.WireError` for what is missing and for what is of no use.
    """
    hints = get_type_hints(kind)
    numbers = [name for name, hint in hints.items() if hint in (int, bool)]
    names = [name for name in hints if name not in numbers]
    count = range(len(counts))
    exactly("the message", arrays, [*others, *(f"{i}.{name}" for i in count for name in names)])
    if any(array.dtype.kind != "i" for array in arrays.values()) or not counts:
        raise WireError("the message has no mask, or an array that is not of integers")
    masks = {}
    for index, (mask, of) in enumerate(counts.items()):
        exactly(f"mask {mask!r}", of, numbers)
        if not all(type(number) is hints[name] for name, number in of.items()):
            raise WireError(f"mask {mask!r} counts {of}")
        tables: dict[str, Any] = {name: arrays[f"{index}.{name}"] for name in names}
        masks[mask] = kind(**of, **tables)
    return masks
