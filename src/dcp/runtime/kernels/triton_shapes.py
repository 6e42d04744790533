"""Tile shapes of the Triton kernels, by architecture, head dimension and bytes of an element."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Shape:
    """Tile of one kernel: rows kept, rows visited at a time, warps, stages of the pipeline."""

    outer: int
    inner: int
    warps: int
    stages: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"128 64 8 2"``."""
        return cls(*map(int, text.split()))

    def shares_table(self, other: Shape) -> bool:
        """Whether one table of tiles can serve both: one visits whole parts of the other's."""
        small, large = sorted((self.inner, other.inner))
        return self.outer == other.outer and large % small == 0

    def __str__(self) -> str:
        return f"{self.outer}×{self.inner}, {self.warps}, {self.stages}"


@dataclass(frozen=True)
class Shapes:
    """Tiles of the four kernels. The two with queries outside share a table, and so do those with
    keys outside: of each two, one keeps as many rows as the other, and visits a whole part of its.
    """

    forward: Shape
    query_gradient: Shape
    key_gradient: Shape
    atomic_key_gradient: Shape

    def __post_init__(self) -> None:
        for one, two in ((self.forward, self.query_gradient), self._keys):
            if not one.shares_table(two):
                raise ValueError(f"tiles {one} and {two} cannot share a table")

    @classmethod
    def parse(cls, text: str) -> Shapes:
        """The four in their order, with a comma between: ``"128 64 8 2, …"``."""
        return cls(*map(Shape.parse, text.split(",")))

    @classmethod
    def alike(cls, shape: Shape) -> Shapes:
        """One shape for all kernels."""
        return cls(*[shape] * len(fields(cls)))

    @property
    def _keys(self) -> tuple[Shape, Shape]:
        return self.key_gradient, self.atomic_key_gradient

    @property
    def queries_tile(self) -> tuple[int, int]:
        """(outer, inner) of the table with queries outside."""
        return self.forward.outer, max(self.forward.inner, self.query_gradient.inner)

    @property
    def keys_tile(self) -> tuple[int, int]:
        """(outer, inner) of the table with keys outside."""
        return self.key_gradient.outer, max(shape.inner for shape in self._keys)


# Architectures that have shapes of their own: compute capabilities 8.0, 9.0, 10.0, and 8.6 for all
# with less shared memory than an A100.
ARCHITECTURES = (80, 86, 90, 100)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # of a block

# forward, query gradient, key gradient, atomic key gradient: the fewest instructions per pair among
# shapes that do not spill in the loop over full tiles, where there are such, as compiled
# (``dcp bench compiled``). Not measured on a device yet.
_HALF = {
    (80, 64): "128 128 8 2, 128 64 8 2, 128 64 8 2, 128 64 8 2",
    (80, 128): "128 64 8 2, 128 32 8 2, 64 64 8 2, 64 64 8 2",
    (80, 256): "64 64 8 2, 64 32 4 2, 32 32 4 1, 32 32 8 1",
    (86, 64): "128 128 8 2, 128 64 8 2, 128 64 8 2, 128 64 8 2",
    (86, 128): "128 64 8 2, 128 32 8 2, 64 64 8 1, 64 64 8 1",
    (86, 256): "64 32 4 2, 64 32 4 1, 32 32 4 1, 32 32 8 1",
    (90, 64): "128 128 8 2, 128 128 8 2, 128 64 8 2, 128 64 8 2",
    (90, 128): "128 128 8 2, 128 64 8 2, 128 32 8 2, 128 64 8 2",
    (90, 256): "128 64 8 2, 128 32 8 1, 32 32 4 1, 32 32 8 1",
    (100, 64): "128 128 8 2, 128 128 8 2, 128 64 8 2, 128 64 8 2",
    (100, 128): "128 128 8 2, 128 64 8 2, 128 64 8 2, 128 32 8 3",
    (100, 256): "128 64 8 2, 128 32 8 1, 32 32 4 1, 32 32 8 1",
}
_SINGLE = {
    64: "64 32 8 2, 64 32 8 2, 32 32 8 2, 32 32 8 2",
    128: "32 32 8 2, 32 32 8 2, 32 32 8 1, 32 32 8 1",
    256: "16 16 8 1, 16 16 8 1, 16 16 8 1, 16 16 8 1",
}
SHAPES = {(*key, 2): Shapes.parse(text) for key, text in _HALF.items()} | {
    (arch, width, 4): Shapes.parse(text)
    for width, text in _SINGLE.items()
    for arch in ARCHITECTURES
}
# The interpreter's cost is per operation, not per element.
INTERPRETER = Shapes.parse("64 64 4 1, 64 32 4 1, 32 64 4 1, 32 32 4 1")


def choose_shapes(device: torch.device, widest: int, dtype: torch.dtype) -> Shapes:
    """The tiles for a device, head dimension (of keys or values, the larger) and dtype."""
    if device.type == "cpu":
        return INTERPRETER
    return SHAPES[architecture(device), max(64, padded(widest)), dtype.itemsize]


def architecture(device: torch.device) -> int:
    """The one of :data:`ARCHITECTURES` whose shapes a CUDA device takes."""
    properties = torch.cuda.get_device_properties(device)
    if getattr(properties, "shared_memory_per_block_optin", 0) < SHARED_BYTES[80]:
        return 86
    return {9: 90, 10: 100}.get(properties.major, 80)


def padded(width: int) -> int:
    """The power of two from ``width`` on."""
    return 1 << (width - 1).bit_length()
