"""Token-budget batches of documents in a seeded order, each token exactly once an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dcp.ragged import expand

OPEN_BATCHES = 8  # how many partly filled batches a document may choose from
ORDERED_FILL = 0.75  # the least full batch that the "ordered" packing keeps
DOCUMENT, START, STOP = range(3)
Piece = tuple[int, int, int]
Deal = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]  # batches made of an epoch's batches


@dataclass(frozen=True)
class TokenBudgetBatches:
    """Batches of whole documents, or pieces of long ones, of at most ``tokens_per_batch`` tokens.

    Packing ``"first_fit"``: a document goes into the oldest open batch that has room for it; when
    more than ``OPEN_BATCHES`` are open, the oldest is handed out. Nothing is dropped: the last
    batches of an epoch are smaller, and documents of 0 tokens are sequences of length 0.

    With a ``bucket_window``, that many documents of the order at a time are sorted by length, cut
    into batches of similar lengths, and these batches are shuffled. Nothing is dropped either.

    Packing ``"ordered"`` is the rule of the DCP paper's artifact (github.com/chenyu-jiang/dcp), to
    reproduce its batches: one order for all epochs; documents are added until the next would
    exceed the budget; a batch less than ``ORDERED_FILL`` full is skipped, its documents with it.

    Args:
        lengths: tokens of each document, int64 ``[n]``.
        tokens_per_batch: the budget.
        max_seqlen: longest sequence; None is the budget.
        over_long: what a document longer than that does: ``"raise"`` a ``ValueError``, or
            ``"split"`` into pieces, which are shuffled like documents.
        seed: of the order, which differs from epoch to epoch; None keeps the documents' own order.
        packing: ``"first_fit"`` or ``"ordered"``.
        bucket_window: documents that are sorted by length together; 0 sorts none.
        first: number of the first document.
    """

    lengths: np.ndarray
    tokens_per_batch: int
    max_seqlen: int | None = None
    over_long: str = "raise"
    seed: int | None = 0
    packing: str = "first_fit"
    bucket_window: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        self._check_options()
        checked_lengths(self.lengths)
        if not len(self.lengths):
            raise ValueError("the dataset is empty: there are no documents to batch")
        worst = int(np.argmax(self.lengths))
        if self.over_long == "raise" and self.lengths[worst] > self.longest:
            limit = "tokens_per_batch" if self.max_seqlen is None else "max_seqlen"
            raise ValueError(
                f"document {self.first + worst} has {self.lengths[worst]} tokens, more than "
                f"{limit}={self.longest}: raise the limit or set over_long='split'"
            )

    def _check_options(self) -> None:
        least = {"tokens_per_batch": 1, "max_seqlen": 1, "seed": 0, "bucket_window": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name in ("max_seqlen", "seed"):
                continue
            if not is_whole(value) or value < lowest:
                raise ValueError(f"{name} must be a whole number, {lowest} or more, got {value!r}")
        if self.over_long not in ("raise", "split"):
            raise ValueError(f"over_long must be 'raise' or 'split', got {self.over_long!r}")
        if self.packing not in ("first_fit", "ordered"):
            raise ValueError(f"packing must be 'first_fit' or 'ordered', got {self.packing!r}")
        if self.bucket_window and self.packing == "ordered":
            raise ValueError(
                f"bucket_window must be 0 for packing='ordered', got {self.bucket_window}"
            )
        if self.longest > self.tokens_per_batch:
            raise ValueError(
                f"max_seqlen must lie between 1 and tokens_per_batch={self.tokens_per_batch}, "
                f"got {self.max_seqlen}"
            )

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return self.tokens_per_batch if self.max_seqlen is None else self.max_seqlen

    def epoch(self, epoch: int, *window: int) -> Iterator[np.ndarray]:
        """Batches of one epoch: int64 ``[n, 3]`` of (document, start, stop) each.

        Where these documents are but a ``window`` of the epoch, its number is part of the seed.
        """
        # The artifact keeps one order for all epochs.
        rng = self._rng(0 if self.packing == "ordered" else epoch, *window)
        pieces = self._pieces(rng)
        batches: Iterator[list[Piece]]
        if self.packing == "ordered":
            full = ORDERED_FILL * self.tokens_per_batch
            batches = (batch for batch in self._in_turn(pieces) if _num_tokens(batch) >= full)
        elif self.bucket_window:
            batches = self._bucketed(pieces, rng)
        else:
            batches = self._first_fit(pieces)
        for batch in batches:
            yield np.array(batch, dtype=np.int64)

    def units(self, pieces: np.ndarray) -> np.ndarray:
        """A number for each of (document, start, stop) ``[n, 3]``; those of one come together."""
        return np.arange(len(pieces))

    def _rng(self, *place: int) -> np.random.Generator | None:
        return None if self.seed is None else np.random.default_rng([self.seed, *place])

    def _first_fit(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        batches: list[list[Piece]] = []
        rooms: list[int] = []
        for piece in pieces:
            need = piece[STOP] - piece[START]
            chosen = next((i for i, room in enumerate(rooms) if room >= need), len(rooms))
            if chosen == len(rooms):
                batches.append([])
                rooms.append(self.tokens_per_batch)
            batches[chosen].append(piece)
            rooms[chosen] -= need
            if len(batches) > OPEN_BATCHES:
                rooms.pop(0)
                yield batches.pop(0)
        yield from batches

    def _in_turn(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        """Batches that end where the next piece would exceed the budget."""
        batch: list[Piece] = []
        room = self.tokens_per_batch
        for piece in pieces:
            need = piece[STOP] - piece[START]
            if batch and need > room:
                yield batch
                batch, room = [], self.tokens_per_batch
            batch.append(piece)
            room -= need
        if batch:
            yield batch

    def _bucketed(
        self, pieces: Iterator[Piece], rng: np.random.Generator | None
    ) -> Iterator[list[Piece]]:
        while window := list(islice(pieces, self.bucket_window)):
            window.sort(key=lambda piece: piece[STOP] - piece[START])
            batches = list(self._in_turn(window))
            order = range(len(batches)) if rng is None else rng.permutation(len(batches))
            yield from (batches[i] for i in order)

    def _pieces(self, rng: np.random.Generator | None) -> Iterator[Piece]:
        """(document, start, stop) of every piece, in the epoch's order."""
        counts = np.maximum(-(-self.lengths // self.longest), 1)
        document, number = expand(counts)
        start = number * self.longest
        stop = np.minimum(start + self.longest, self.lengths[document])
        order = np.arange(len(document))
        if rng is not None:
            order = rng.permutation(len(document))
        columns = (column[order].tolist() for column in (document + self.first, start, stop))
        yield from zip(*columns, strict=True)


def is_whole(value: object) -> bool:
    """Whether it is an integer, of Python or numpy, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def checked_lengths(lengths: Any, num_documents: int | None = None) -> np.ndarray:
    """Tokens of each document, int64 ``[n]``; ``ValueError`` where they cannot be that."""
    try:
        found = np.asarray(lengths)
    except (TypeError, ValueError) as error:
        raise ValueError(f"document lengths must be a vector of integers: {error}") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        values = found.ravel().tolist()
        other = next((v for v in values if not is_whole(v)), None)
        value = next((v for v in values if v != v), other)  # NaN before a float that is whole
        raise ValueError(
            f"document lengths must be a vector of integers, got {found.dtype} of shape "
            f"{found.shape} with {value!r:.40}"
        )
    if num_documents is not None and len(found) != num_documents:
        raise ValueError(
            f"the dataset has {num_documents} documents but gives {len(found)} lengths: "
            f"give one length a document"
        )
    for document in np.flatnonzero((found < 0) | (found > np.iinfo(np.int64).max))[:1].tolist():
        raise ValueError(
            f"document lengths must be 0 or more, got {found[document]} for document {document}"
        )
    return found.astype(np.int64)


def _num_tokens(batch: list[Piece]) -> int:
    return sum(stop - start for _, start, stop in batch)


@dataclass(frozen=True)
class PlacedBatch:
    """A batch and its place.

    Attributes:
        pieces: (document, start, stop) of every sequence, int64 ``[n, 3]``.
        last: the batch ends its epoch.
        num_batches: batches of the epoch to which the next batch belongs; of a stream, 0.
        error: why there is no such batch.
    """

    epoch: int
    position: int
    pieces: np.ndarray
    last: bool
    num_batches: int
    error: Exception | None = None


class BatchesFrom(Iterator[PlacedBatch]):
    """All batches from a place on, epoch after epoch, without end.

    ``num_batches`` counts those of the epoch to which the next one belongs. ``deal`` makes other
    batches of an epoch's.

    Raises ``ValueError``, when it is made, where there is no such place.
    """

    def __init__(
        self, batches: TokenBudgetBatches, *, epoch: int, position: int, deal: Deal | None = None
    ) -> None:
        self._batches, self._deal = batches, deal
        if epoch < 0:
            raise ValueError(f"cannot resume in epoch {epoch}: epochs count from 0")
        self._begin(epoch)
        if not 0 <= position < self.num_batches:
            raise ValueError(
                f"cannot resume at batch {position} of epoch {epoch}: "
                f"it has {self.num_batches} batches"
            )
        self._position = position

    def __next__(self) -> PlacedBatch:
        epoch, position, pieces = self._epoch, self._position, self._order[self._position]
        self._position += 1
        if last := self._position == self.num_batches:
            self._begin(epoch + 1)
        return PlacedBatch(epoch, position, pieces, last, self.num_batches)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order: Sequence[np.ndarray] = list(self._batches.epoch(epoch))
        if self._deal is not None:
            self._order = self._deal(self._order)
        self.num_batches: int = len(self._order)
        if not self._order:
            raise ValueError(
                f"no batch of epoch {epoch} is {ORDERED_FILL:.0%} full: lower tokens_per_batch="
                f"{self._batches.tokens_per_batch} or use packing='first_fit'"
            )
