"""What the books say of one sequence: which rank has which token, and in which pages."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from dcp.inference.pages import Pages

SequenceId = Hashable
RANK_TYPE, MOST_RANKS = "H", 1 << 16  # of arrays of ranks


@dataclass(frozen=True)
class Table:
    """Pages of one sequence, for layers of one kind.

    Attributes:
        first: tokens before this position are not kept.
        gone: how many of those each rank had, int64 ``[num_ranks]``.
        pages: of each rank, from the page of its first kept token on.
    """

    first: int
    gone: np.ndarray
    pages: tuple[tuple[int, ...], ...]

    def shortened(self, book: Pages, first: int, gone: np.ndarray, page_size: int) -> Table:
        """Without the tokens before ``first``, ``gone`` of each rank; their pages are let go."""
        leaves = gone // page_size - self.gone // page_size
        kept = list(self.pages)
        for rank in np.flatnonzero(leaves).tolist():
            book.release(rank, kept[rank][: leaves[rank]])
            kept[rank] = kept[rank][leaves[rank] :]
        return Table(first, gone, tuple(kept))

    def longer(self, book: Pages, more: np.ndarray) -> Table:
        """With so many more pages on each rank."""
        pages = list(self.pages)
        for rank in np.flatnonzero(more).tolist():
            pages[rank] += book.take(rank, int(more[rank]))
        return Table(self.first, self.gone, tuple(pages))


@dataclass(frozen=True)
class Held:
    """One sequence.

    Attributes:
        owner: rank of each token; what is behind ``num_tokens`` was undone.
        held: tokens of each rank, int64 ``[num_ranks]``.
        tables: of each kind of layers.
    """

    owner: array[int]
    held: np.ndarray
    tables: tuple[Table, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.held.sum())

    def owners(self, first: int, end: int) -> np.ndarray:
        """The ranks of the tokens at these positions."""
        return np.array(self.owner[first:end], dtype=np.int64)
