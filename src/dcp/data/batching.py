"""Token-budget batches of documents in a seeded order, each token exactly once an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

OPEN_BATCHES = 8  # how many partly filled batches a document may choose from
DOCUMENT, START, STOP = range(3)


@dataclass(frozen=True)
class TokenBudgetBatches:
    """Batches of whole documents, or pieces of long ones, of at most ``tokens_per_batch`` tokens.

    A document goes into the oldest open batch that has room for it; when more than
    ``OPEN_BATCHES`` are open, the oldest is handed out. Nothing is dropped: the last batches of an
    epoch are smaller, and documents of 0 tokens are sequences of length 0.

    Args:
        lengths: tokens of each document, int64 ``[n]``.
        tokens_per_batch: the budget.
        max_seqlen: longest sequence; None is the budget.
        over_long: what a document longer than that does: ``"raise"`` a ``ValueError``, or
            ``"split"`` into pieces, which are shuffled like documents.
        seed: of the order, which differs from epoch to epoch; None keeps the documents' own order.
    """

    lengths: np.ndarray
    tokens_per_batch: int
    max_seqlen: int | None = None
    over_long: str = "raise"
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be 1 or more, got {self.tokens_per_batch}")
        if self.over_long not in ("raise", "split"):
            raise ValueError(f"over_long must be 'raise' or 'split', got {self.over_long!r}")
        if not len(self.lengths):
            raise ValueError("the dataset is empty: there are no documents to batch")
        if (self.lengths < 0).any():
            raise ValueError(f"document lengths must be 0 or more, got {self.lengths.min()}")
        if not 1 <= self.longest <= self.tokens_per_batch:
            raise ValueError(
                f"max_seqlen must lie between 1 and tokens_per_batch={self.tokens_per_batch}, "
                f"got {self.max_seqlen}"
            )
        worst = int(np.argmax(self.lengths))
        if self.over_long == "raise" and self.lengths[worst] > self.longest:
            limit = "tokens_per_batch" if self.max_seqlen is None else "max_seqlen"
            raise ValueError(
                f"document {worst} has {self.lengths[worst]} tokens, more than "
                f"{limit}={self.longest}: raise the limit or set over_long='split'"
            )

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return self.tokens_per_batch if self.max_seqlen is None else self.max_seqlen

    def epoch(self, epoch: int) -> Iterator[np.ndarray]:
        """Batches of one epoch: int64 ``[n, 3]`` of (document, start, stop) each."""
        batches: list[list[tuple[int, int, int]]] = []
        rooms: list[int] = []
        for piece in self._pieces(epoch):
            need = piece[STOP] - piece[START]
            chosen = next((i for i, room in enumerate(rooms) if room >= need), len(rooms))
            if chosen == len(rooms):
                batches.append([])
                rooms.append(self.tokens_per_batch)
            batches[chosen].append(piece)
            rooms[chosen] -= need
            if len(batches) > OPEN_BATCHES:
                rooms.pop(0)
                yield np.array(batches.pop(0), dtype=np.int64)
        for batch in batches:
            yield np.array(batch, dtype=np.int64)

    def _pieces(self, epoch: int) -> Iterator[tuple[int, int, int]]:
        """(document, start, stop) of every piece, in the epoch's order."""
        counts = np.maximum(-(-self.lengths // self.longest), 1)
        document = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = number * self.longest
        stop = np.minimum(start + self.longest, self.lengths[document])
        order = np.arange(len(document))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(document))
        columns = (column[order].tolist() for column in (document, start, stop))
        yield from zip(*columns, strict=True)


@dataclass(frozen=True)
class PlacedBatch:
    """A batch and its place: ``pieces`` int64 ``[n, 3]``; ``last`` is true where an epoch ends."""

    epoch: int
    position: int
    pieces: np.ndarray
    last: bool


def batches_from(
    batches: TokenBudgetBatches, *, epoch: int, position: int
) -> Iterator[PlacedBatch]:
    """All batches from a place on, epoch after epoch, without end."""
    while True:
        count = 0
        pieces: np.ndarray | None = None
        for count, following in enumerate(batches.epoch(epoch)):
            if count > position:
                assert pieces is not None
                yield PlacedBatch(epoch, count - 1, pieces, last=False)
            pieces = following
        if position > count or pieces is None:
            raise ValueError(
                f"cannot resume at batch {position} of epoch {epoch}: it has {count + 1} batches"
            )
        yield PlacedBatch(epoch, count, pieces, last=True)
        epoch, position = epoch + 1, 0
