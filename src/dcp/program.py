"""One rank's work: instructions, and the compact form in which they travel.

Five kinds of instruction: attention, reduce, copy, launch communication, wait. The forward and the
backward program of a mask come from the same tables; the backward one also clears, sends and sums
partial key and value gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.schedule import DKV
from dcp.wire import pack, unpack


@dataclass(frozen=True)
class Attention:
    """One fused launch. ``items`` columns: q_row, kv_row, out_row, dkv_row, q_rows, kv_rows,
    group, slice_start, slice_end. ``resets`` columns: buffer, row, rows."""

    step: int
    items: np.ndarray
    resets: np.ndarray


@dataclass(frozen=True)
class Reduce:
    """Merge or add arrived rows into own rows. ``rows`` columns: buffer, source, target, rows."""

    step: int
    rows: np.ndarray


@dataclass(frozen=True)
class Copy:
    """``load`` brings the rank's tensors into its buffers, ``store`` takes the result out."""

    direction: str


@dataclass(frozen=True)
class Launch:
    """Start communication ``step``. Columns of both: peer, buffer, row, rows; a peer's rows in
    one message, in this order."""

    step: int
    sends: np.ndarray
    receives: np.ndarray


@dataclass(frozen=True)
class Wait:
    """Wait until communication ``step`` is complete."""

    step: int


Instruction = Attention | Reduce | Copy | Launch | Wait


@dataclass(frozen=True)
class MaskProgram:
    """One rank's tables of one mask. Each table's first column is the step."""

    num_steps: int
    items: np.ndarray
    sends: np.ndarray
    receives: np.ndarray
    reduces: np.ndarray
    resets: np.ndarray
    buffer_rows: np.ndarray
    slices: np.ndarray

    def instructions(self, *, backward: bool = False) -> list[Instruction]:
        """The program, in the order of execution (see :mod:`dcp.schedule`)."""
        return list(self._instructions(DKV if backward else DKV - 1))

    def _instructions(self, last_buffer: int) -> Iterator[Instruction]:
        sends = self.sends[self.sends[:, 2] <= last_buffer]
        receives = self.receives[self.receives[:, 2] <= last_buffer]
        reduces = self.reduces[self.reduces[:, 1] <= last_buffer]
        resets = self.resets[self.resets[:, 1] <= last_buffer]
        yield Copy("load")
        for step in range(self.num_steps):
            out, into = _at(sends, step + 1), _at(receives, step + 1)
            if len(out) or len(into):
                yield Launch(step + 1, out, into)
            items = _at(self.items, step)
            if len(items):
                yield Attention(step, items, _at(resets, step))
            if len(out) or len(into):
                yield Wait(step + 1)
            arrived = _at(reduces, step)
            if len(arrived):
                yield Reduce(step, arrived)
        yield Copy("store")


def _at(table: np.ndarray, step: int) -> np.ndarray:
    start, stop = np.searchsorted(table[:, 0], [step, step + 1])
    return table[start:stop, 1:]


_TABLES = ("items", "sends", "receives", "reduces", "resets", "buffer_rows", "slices")


@dataclass(frozen=True)
class RankPlan:
    """What one rank needs of a plan: its tokens and its programs. Small, and all that is shipped.

    Attributes:
        rank, num_ranks, num_tokens: whose plan it is; tokens of the whole batch.
        num_local_keys: rows of the rank's keys and values, its cached ones among them.
        spec, num_head_groups: heads, and how many head groups a row is one of.
        token_indices: global index of each local token, int64 ``[local]``.
        positions: position of each local token in its own sequence, int64 ``[local]``.
        sequence_ids: sequence of each local token, int64 ``[local]``.
        masks: programs by mask name.
        stats: figures of the whole plan (:class:`dcp.plan.Stats` as a dict).
    """

    rank: int
    num_ranks: int
    num_tokens: int
    num_local_keys: int
    spec: AttentionSpec
    num_head_groups: int
    block_sequence: np.ndarray
    block_offset: np.ndarray
    block_position: np.ndarray
    block_length: np.ndarray
    masks: dict[str, MaskProgram]
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def num_local_tokens(self) -> int:
        return int(self.block_length.sum())

    @property
    def token_indices(self) -> np.ndarray:
        return runs(self.block_offset, self.block_length)

    @property
    def positions(self) -> np.ndarray:
        return runs(self.block_position, self.block_length)

    @property
    def sequence_ids(self) -> np.ndarray:
        return np.repeat(self.block_sequence, self.block_length)

    def mask_program(self, mask: str | None = None) -> MaskProgram:
        """The programs of ``mask``, by default the first; unknown names raise ``ValueError``."""
        name = next(iter(self.masks)) if mask is None else mask
        if name not in self.masks:
            raise ValueError(f"the plan has no mask {name!r}, it has {', '.join(self.masks)}")
        return self.masks[name]

    def to_bytes(self) -> bytes:
        """The rank's plan as one checked message (:mod:`dcp.wire`)."""
        arrays = {
            name: getattr(self, name)
            for name in ("block_sequence", "block_offset", "block_position", "block_length")
        }
        for index, program in enumerate(self.masks.values()):
            arrays |= {f"{index}.{name}": getattr(program, name) for name in _TABLES}
        meta = {
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "num_tokens": self.num_tokens,
            "num_local_keys": self.num_local_keys,
            "spec": vars(self.spec),
            "num_head_groups": self.num_head_groups,
            "masks": {name: program.num_steps for name, program in self.masks.items()},
            "stats": self.stats,
        }
        return pack("rank-plan", meta, arrays)

    @classmethod
    def from_bytes(cls, message: bytes) -> RankPlan:
        """Read what :meth:`to_bytes` wrote; :class:`dcp.wire.WireError` for anything else."""
        meta, arrays = unpack("rank-plan", message)
        masks = {
            name: MaskProgram(num_steps, *(arrays[f"{index}.{table}"] for table in _TABLES))
            for index, (name, num_steps) in enumerate(meta["masks"].items())
        }
        return cls(
            rank=meta["rank"],
            num_ranks=meta["num_ranks"],
            num_tokens=meta["num_tokens"],
            num_local_keys=meta["num_local_keys"],
            spec=AttentionSpec(**meta["spec"]),
            num_head_groups=meta["num_head_groups"],
            block_sequence=arrays["block_sequence"],
            block_offset=arrays["block_offset"],
            block_position=arrays["block_position"],
            block_length=arrays["block_length"],
            masks=masks,
            stats=meta["stats"],
        )


def runs(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``start[0], start[0] + 1, …`` for ``length[0]`` values, then the next run."""
    before = np.cumsum(length) - length
    return np.arange(int(length.sum())) + np.repeat(start - before, length)
