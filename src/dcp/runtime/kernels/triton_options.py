"""What the Triton kernels can do otherwise than by default."""

from __future__ import annotations

from dataclasses import dataclass

MOST_PARTS = 8


@dataclass(frozen=True)
class TritonOptions:
    """Forms of the Triton kernels that no device has shown to pay yet; all are off.

    ``kernel=TritonKernel(TritonOptions(pack_heads=4))`` in place of a kernel's name asks for them.

    Attributes:
        pack_heads: query heads of one KV head that share a tile, in which there are so many times
            fewer rows: for short documents. A power of two up to 16 that divides their number.
        key_programs: programs that a key-gradient launch should have: with fewer, the visits of
            each tile are shared by 2, 4 or 8 programs, whose sums are then added in a fixed order.
            Twice the device's multiprocessors is a good start; 0: never.
        descriptors: full tiles are loaded through tensor descriptors (TMA from Hopper on), where
            queries and values have one width, a power of two.
    """

    pack_heads: int = 1
    key_programs: int = 0
    descriptors: bool = False

    def __post_init__(self) -> None:
        if self.pack_heads not in (1, 2, 4, 8, 16):
            raise ValueError(f"pack_heads must be 1, 2, 4, 8 or 16, got {self.pack_heads!r}")
        if self.key_programs < 0:
            raise ValueError(f"key_programs must be 0 or more, got {self.key_programs!r}")

    def parts(self, programs: int) -> int:
        """How many programs share each tile of a key-gradient launch that has ``programs``."""
        parts = 1
        while parts < MOST_PARTS and programs * parts < self.key_programs:
            parts *= 2
        return parts


DEFAULT = TritonOptions()
