"""Pyramid activation checkpointing: which layers may keep their activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerKind:
    """Alike layers: how many, what recomputing one costs, and what keeping one costs."""

    name: str
    count: int
    forward_seconds: float
    activation_bytes: int


def keep_activations(kinds: Sequence[LayerKind], free_bytes: int) -> dict[str, int]:
    """Layers of each kind that keep their activations: most seconds saved within ``free_bytes``.

    Exact, to the byte: of all counts of all kinds but the last, with as many of the last as still
    fit. Of equal savings the one with fewest bytes is taken.
    """
    best = _search(kinds, max(free_bytes, 0))
    return {kind.name: count for kind, count in zip(kinds, best[2], strict=True)}


def _search(kinds: Sequence[LayerKind], free: int) -> tuple[float, int, tuple[int, ...]]:
    """(seconds saved, minus bytes used, counts), the largest."""
    if not kinds:
        return 0.0, 0, ()
    first, *rest = kinds
    most = first.count
    if first.activation_bytes > 0:
        most = min(most, free // first.activation_bytes)
    counts = range(most + 1) if rest else (0, most)
    found = []
    for count in counts:
        used = count * first.activation_bytes
        saved, minus, others = _search(rest, free - used)
        found.append((saved + count * first.forward_seconds, minus - used, (count, *others)))
    return max(found)
