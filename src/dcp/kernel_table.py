"""What attention kernels were measured to reach on a device: the table of a cluster file.

A line is one kernel on blocks of one mask kind, for one dtype and head_dim: FLOP per second by the
side of a square block. The planner's costs and the choice of a kernel read the same lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from dcp.batch import DTYPE_BYTES, MOST_WIDTH
from dcp.checks import positive, shown, whole, whole_numbers

BLOCK_MASKS = ("full", "causal", "banded")
FORWARD_FLOPS = 4.0  # per pair, head and width: two products of a multiply and an add
BACKWARD_FLOPS = 10.0  # five products


@dataclass(frozen=True, kw_only=True)
class KernelRates:
    """One line.

    FLOPs are those of the pairs that the mask keeps; what a kernel computes beyond them lowers its
    rate.

    Attributes:
        kernel: a name of :data:`dcp.runtime.kernels.KERNELS`.
        dtype, head_dim: of queries, keys and values.
        mask: of :data:`BLOCK_MASKS`; a banded block keeps a window of half its side.
        sides: of the square blocks, in tokens, ascending.
        forward, backward: FLOP per second at each side; ``backward`` is empty of a kernel that
            has no backward pass.
    """

    kernel: str
    dtype: str
    head_dim: int
    mask: str
    sides: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, str):
            raise ValueError(f"kernel_table kernel must be a string, got {shown(self.kernel)}")
        for name, known in (("dtype", DTYPE_BYTES), ("mask", BLOCK_MASKS)):
            if (given := getattr(self, name)) not in tuple(known):
                raise ValueError(
                    f"kernel_table {name} {shown(given)} is not one of {', '.join(known)}"
                )
        width = whole("kernel_table head_dim", self.head_dim, least=1, most=MOST_WIDTH)
        sides = whole_numbers("kernel_table sides", self.sides, least=1)
        if not len(sides) or (np.diff(sides) <= 0).any():
            raise ValueError(f"kernel_table sides must ascend, got {shown(sides.tolist())}")
        object.__setattr__(self, "head_dim", width)
        object.__setattr__(self, "sides", tuple(sides.tolist()))
        for name in ("forward", "backward"):
            given = getattr(self, name)
            counts = (len(sides), 0) if name == "backward" else (len(sides),)
            if not isinstance(given, (list, tuple)) or len(given) not in counts:
                raise ValueError(
                    f"kernel_table {name} must have a rate for each of {len(sides)} sides, got "
                    f"{shown(given)}"
                )
            rates = tuple(positive(f"kernel_table {name}", rate) for rate in given)
            object.__setattr__(self, name, rates)


KernelTable = tuple[KernelRates, ...]


def checked_table(given: Any) -> KernelTable:
    """A table of lines, or of the JSON objects of lines; ``ValueError`` for what is none."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"kernel_table must be a list of lines, got {shown(given)}")
    table = tuple(_line(each) for each in given)
    lines: dict[tuple[str, str, int], list[str]] = {}
    for line in table:
        lines.setdefault(_key(line), []).append(line.mask)
    for (kernel, dtype, head_dim), masks in lines.items():
        whose = f"of {kernel}, {dtype}, head_dim {head_dim}"
        if "full" not in masks:
            raise ValueError(f"kernel_table has no line {whose} for full blocks: measure them")
        if len(set(masks)) < len(masks):
            raise ValueError(f"kernel_table has two lines {whose} for one mask: {shown(masks)}")
    return table


def scaled_table(table: KernelTable, *, forward: float, backward: float) -> KernelTable:
    """The table of a device on which passes take ``forward`` and ``backward`` times as long."""
    return tuple(
        KernelRates(
            **asdict(line)
            | {
                "forward": tuple(rate / forward for rate in line.forward),
                "backward": tuple(rate / backward for rate in line.backward),
            }
        )
        for line in table
    )


class Curves:
    """Seconds of blocks of any size by one kernel, one dtype, one head_dim.

    Between measured sides, seconds are a power of the side; beyond them, the rate is the last
    one's. A larger block never takes less time than a smaller one: where noise has it so, the
    smaller one's seconds count for both.
    """

    def __init__(self, lines: Mapping[str, KernelRates]) -> None:
        self.trains = all(line.backward for line in lines.values())
        usual = {"causal": ("causal", "full"), "banded": ("banded", "causal", "full")}
        self._curves = {
            (mask, backward): _curve(
                next(lines[each] for each in usual.get(mask, (mask,)) if each in lines), backward
            )
            for mask in BLOCK_MASKS
            for backward in ((False, True) if self.trains else (False,))
        }

    def flops(
        self, area: np.ndarray, q_rows: np.ndarray, kv_rows: np.ndarray, *, backward: bool
    ) -> np.ndarray:
        """FLOP per second of blocks that keep ``area`` of their ``q_rows * kv_rows`` pairs.

        A cut block that keeps half of them, within what a diagonal's own pairs make, counts as
        causal, any other one as banded.
        """
        pairs = np.asarray(q_rows * kv_rows, dtype=float)
        log_side = np.log(np.maximum(pairs, 1.0)) / 2
        half = np.abs(2.0 * area - pairs) <= q_rows + kv_rows
        kind = np.where(area >= pairs, 0, np.where(half, 1, 2))
        each = [np.interp(log_side, *self._curves[mask, backward]) for mask in BLOCK_MASKS]
        rates: np.ndarray = np.exp(np.choose(kind, each))
        return rates

    def most_flops(self, *, backward: bool) -> float:
        """FLOP per second of the best block: no block is faster."""
        return float(np.exp(max(self._curves[mask, backward][1].max() for mask in BLOCK_MASKS)))

    def log_pair_seconds(self, sides: np.ndarray) -> float:
        """Mean logarithm of a pair's seconds, forward and (if it has one) backward."""
        total = []
        for mask in BLOCK_MASKS:
            seconds = FORWARD_FLOPS / np.exp(np.interp(np.log(sides), *self._curves[mask, False]))
            if self.trains:
                there = np.exp(np.interp(np.log(sides), *self._curves[mask, True]))
                seconds = seconds + BACKWARD_FLOPS / there
            total.append(np.log(seconds))
        return float(np.mean(total))


def table_curves(table: KernelTable) -> dict[tuple[str, str, int], Curves]:
    """By kernel, dtype and head_dim."""
    lines: dict[tuple[str, str, int], dict[str, KernelRates]] = {}
    for line in table:
        lines.setdefault(_key(line), {})[line.mask] = line
    return {key: Curves(by_mask) for key, by_mask in lines.items()}


def fastest_kernel(table: KernelTable, dtype: str, head_dim: int) -> str | None:
    """The kernel that trains fastest on the blocks of the table, the mean of logarithms over sides
    and masks; None where the table has none for that dtype and head_dim."""
    sides = np.unique([side for line in table for side in line.sides])
    seconds = {
        kernel: curves.log_pair_seconds(sides)
        for (kernel, *rest), curves in table_curves(table).items()
        if rest == [dtype, head_dim] and curves.trains
    }
    return min(seconds, key=lambda kernel: seconds[kernel]) if seconds else None


def _key(line: KernelRates) -> tuple[str, str, int]:
    return line.kernel, line.dtype, line.head_dim


def _line(given: Any) -> KernelRates:
    if isinstance(given, KernelRates):
        return given
    names = {each.name for each in fields(KernelRates)}
    if not isinstance(given, Mapping) or set(given) != names:
        raise ValueError(
            f"a line of kernel_table must have {', '.join(sorted(names))}, got {shown(given)}"
        )
    return KernelRates(**given)


def _curve(line: KernelRates, backward: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of sides and of rates."""
    log_side = np.log(np.array(line.sides, dtype=float))
    log_rate = np.log(np.array(line.backward if backward else line.forward))
    seconds = np.maximum.accumulate(2 * log_side - log_rate)  # of the block, but for a constant
    return log_side, 2 * log_side - seconds
