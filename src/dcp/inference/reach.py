"""How far back the layers of a model see, and so which cached tokens new ones still need."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dcp.checks import whole
from dcp.mask_names import parse_mask
from dcp.masks import AttnMask
from dcp.slices import SliceRow, make_slices


@dataclass(frozen=True)
class Reach:
    """What a token sees of those before it in its sequence: all, or the nearest.

    Args:
        window: itself and those before it, so many in all.
        chunk: those of its own chunk of so many tokens.
    """

    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("window", self.window), ("chunk", self.chunk)):
            if size is not None:
                whole(name, size, least=1)
        if self.window is not None and self.chunk is not None:
            raise ValueError(f"window={self.window} and chunk={self.chunk}: give one of them")

    @property
    def is_all(self) -> bool:
        return self.window is None and self.chunk is None

    def first(self, position: int) -> int:
        """The first position that a token at ``position`` sees."""
        if self.window is not None:
            return max(position - self.window + 1, 0)
        return 0 if self.chunk is None else position // self.chunk * self.chunk


def reach_of(mask: str) -> Reach:
    """How far back a mask of :func:`dcp.integrations.describe.attention_of` shows tokens.

    Raises ``ValueError`` for a mask that is not causal, a window or in chunks.
    """
    name, sizes = parse_mask(mask)
    if name not in ("causal", "sliding_window", "chunked"):
        raise ValueError(f"mask {mask!r} cannot be served: it is not causal, a window or in chunks")
    return Reach(**sizes)


def turn_mask(reach: Reach, past: int, owner: np.ndarray, new: int) -> AttnMask | str:
    """What new tokens see of the kept ones and of each other, as a turn's batch numbers them.

    Kept tokens are numbered rank by rank, by position on each; the new ones follow. A run of
    positions on one rank is a band; those that all new tokens see are one rectangle a rank.

    Args:
        past: tokens before the new ones.
        owner: the rank of each of those that the first new token sees, the last ones of the past.
    """
    count = len(owner)
    if reach.first(past + new - 1) <= past - count:
        return "causal"
    position = np.arange(past - count, past)
    order = np.argsort(owner, kind="stable")
    owner, position = owner[order], position[order]
    if reach.chunk is not None:
        edge = reach.first(past) + reach.chunk - past  # where the chunk that was begun ends
        edges = [0, *range(edge, new, reach.chunk), new]
        rows: list[SliceRow] = [(0, min(edge, new), 0, count, None, None)]
        rows += [(a, b, count + a, count + b, None, count) for a, b in pairwise(edges)]
        return AttnMask(new, count + new, make_slices(rows))
    assert reach.window is not None
    by_all = position >= reach.first(past + new - 1)
    goes_on = (owner[1:] == owner[:-1]) & (by_all[1:] == by_all[:-1])
    goes_on &= by_all[1:] | (position[1:] == position[:-1] + 1)
    begin = np.flatnonzero(np.append(True, ~goes_on)[:count])
    end = np.append(begin[1:], count)[: len(begin)]
    least = np.where(by_all[begin], -new, past - reach.window + 1 - position[begin] + begin)
    bands = np.stack([begin, end, least], axis=1).tolist()
    rows = [(0, new, a, b, lo, None) for a, b, lo in bands]
    rows.append((0, new, count, count + new, count - reach.window + 1, count))
    return AttnMask(new, count + new, make_slices(rows))
