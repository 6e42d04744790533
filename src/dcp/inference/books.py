"""Which token of which sequence lies where: the books of a cache, the same on every rank."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcp.checks import shown, whole
from dcp.inference.held import RANK_TYPE, Held, SequenceId, Table
from dcp.inference.pages import Pages
from dcp.inference.reach import Reach, turn_mask
from dcp.masks import AttnMask
from dcp.ragged import runs

Extent = dict[SequenceId, Held]


class Books:
    """What each rank holds of each sequence, and in which pages, for each kind of layers.

    Layers that see equally far back are of one kind, and have their pages in common: page 3 of a
    kind is page 3 of each of its layers' pools. Every rank keeps the books of all ranks, so that
    all of them find a cache full, or plan a turn, alike.

    Args:
        kinds: how far back the layers of each kind see.
        num_pages: of each kind, on each rank.
        page_size: tokens of a page.
        rank, num_ranks: which of the ranks this is.
    """

    def __init__(
        self,
        kinds: Sequence[Reach],
        num_pages: Sequence[int],
        *,
        page_size: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.kinds, self.page_size = tuple(kinds), page_size
        self.rank, self.num_ranks = rank, num_ranks
        self._pages = [Pages(count, num_ranks) for count in num_pages]
        self._sequences: Extent = {}

    # ------------------------------------------------------------------ what is there

    @property
    def sequences(self) -> list[SequenceId]:
        """Sequences with cached tokens, in the order in which they came."""
        return list(self._sequences)

    def known(self, sequence: SequenceId) -> Held:
        """``ValueError`` for an unknown one."""
        if sequence not in self._sequences:
            raise ValueError(f"sequence {sequence!r} is not in the cache")
        return self._sequences[sequence]

    def num_pages_of(self, kind: int) -> int:
        """Pages of each layer of a kind."""
        return self._pages[kind].num_pages

    def held(self, sequences: Sequence[SequenceId]) -> np.ndarray:
        """Tokens of each sequence on each rank, int64 ``[n, num_ranks]``; 0 for unknown ones."""
        none = np.zeros(self.num_ranks, dtype=np.int64)
        rows = [self._sequences[s].held if s in self._sequences else none for s in sequences]
        return np.array(rows, dtype=np.int64).reshape(-1, self.num_ranks)

    def seen(self, sequences: Sequence[SequenceId], kind: int = 0) -> np.ndarray:
        """:meth:`held`, without the tokens that are too far back for the next one."""
        seen = self.held(sequences)
        for row, each in zip(seen, sequences, strict=True):
            if each in self._sequences:
                row -= self._gone(self._sequences[each], kind)[1]
        return seen

    def masks(
        self, sequences: Sequence[SequenceId], new: Sequence[int], kind: int = 0
    ) -> list[AttnMask | str] | str:
        """What new tokens of each sequence see, see :func:`dcp.inference.reach.turn_mask`."""
        reach, masks = self.kinds[kind], []
        if reach.is_all:
            return "causal"
        for each, count in zip(sequences, new, strict=True):
            known = self._sequences.get(each, self._empty())
            past = known.num_tokens
            owner = known.owners(reach.first(past), past)
            masks.append(turn_mask(reach, past, owner, count))
        return masks if any(isinstance(mask, AttnMask) for mask in masks) else "causal"

    @property
    def free_pages(self) -> np.ndarray:
        """Free pages of every rank, int64 ``[num_ranks]``: of the kind that has the fewest."""
        free: np.ndarray = np.min([pages.free for pages in self._pages], axis=0)
        return free

    def row_runs(
        self, sequences: Sequence[SequenceId], kind: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """This rank's rows of the sequences, in order: first row and length of every run."""
        start, length = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for each in sequences:
            if each in self._sequences:
                known, size = self._sequences[each], self.page_size
                table, held = known.tables[kind], known.held[self.rank]
                gone, pages = table.gone[self.rank], np.array(table.pages[self.rank], np.int64)
                index = (gone // size + np.arange(len(pages))) * size
                skipped = np.maximum(gone - index, 0)
                start.append(pages * size + skipped)
                length.append(np.minimum(held - index, size) - skipped)
        first, count = np.concatenate(start), np.concatenate(length)
        return first[count > 0], count[count > 0]

    def rows(self, sequences: Sequence[SequenceId], kind: int = 0) -> np.ndarray:
        """This rank's rows of the sequences, each sequence in the order of writing: int64."""
        return runs(*self.row_runs(sequences, kind))

    # ------------------------------------------------------------------ what changes

    def extend(
        self, sequences: Sequence[SequenceId], owners: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Make room for new tokens of some sequences; returns their rows here, of each kind: int64.

        What these tokens cannot see any more is forgotten first, and pages of nothing else are
        free again.

        Args:
            owners: the rank of each new token, of each sequence.

        Raises ``ValueError`` where any rank's pages do not suffice, on all ranks alike; then
        nothing is added.
        """
        owners = self._checked(sequences, owners)
        for each in sequences:
            if each in self._sequences:
                self._sequences[each] = self._shortened(self._sequences[each])
        before, none = self.held(sequences), np.zeros((0, self.num_ranks), dtype=np.int64)
        new = np.stack([*none, *(np.bincount(of, minlength=self.num_ranks) for of in owners)])
        more = -(-(before + new) // self.page_size) + (-before // self.page_size)
        self._check_room(more.sum(axis=0))
        for each, of, had, adds, wanted in zip(sequences, owners, before, new, more, strict=True):
            known = self._sequences.get(each, self._empty())
            tables = [
                table.longer(pages, wanted)
                for table, pages in zip(known.tables, self._pages, strict=True)
            ]
            del known.owner[known.num_tokens :]
            known.owner.extend(of.tolist())
            self._sequences[each] = Held(known.owner, had + adds, tuple(tables))
        return [self._new_rows(sequences, before, kind) for kind in range(len(self.kinds))]

    def keeps(self, sequence: SequenceId, num_tokens: int) -> bool:
        """Whether :meth:`share_pages` can share so many of its tokens."""
        known = self._sequences.get(sequence)
        return (
            known is not None
            and num_tokens <= known.num_tokens
            and all(
                table.first <= reach.first(num_tokens)
                for table, reach in zip(known.tables, self.kinds, strict=True)
            )
        )

    def share_pages(
        self, from_: SequenceId, to: SequenceId, *, num_tokens: int
    ) -> list[tuple[int, int, int]]:
        """Let the unknown sequence ``to`` begin with the first ``num_tokens`` tokens of ``from_``.

        Full pages, which are never written again, are then used by both. Of the last page, which
        both may go on with, ``to`` gets its own: returns for each kind the page here, the new one,
        and how many rows to copy.

        Raises ``ValueError`` for sequences that do not fit, for tokens that are not cached any
        more, and where pages do not suffice; then nothing is changed.
        """
        self._check_share(from_, to, num_tokens)
        known, size = self._sequences[from_], self.page_size
        held = np.bincount(known.owners(0, num_tokens), minlength=self.num_ranks)
        full, rest = np.divmod(held, size)
        last = np.minimum(rest, 1)
        self._check_room(last)
        tables, copies = [], []
        for reach, table, book in zip(self.kinds, known.tables, self._pages, strict=True):
            first = reach.first(num_tokens)
            gone = np.bincount(known.owners(0, first), minlength=self.num_ranks)
            begin, end = gone // size - table.gone // size, full - table.gone // size
            shared = [of[a:b] for of, a, b in zip(table.pages, begin, end, strict=True)]
            for rank, pages in enumerate(shared):
                book.share(rank, pages)
            tables.append(Table(first, gone, tuple(shared)).longer(book, last))
            if rest[self.rank]:
                old, new = (of.pages[self.rank] for of in (table, tables[-1]))
                copies.append((old[end[self.rank]], new[-1], int(rest[self.rank])))
            else:
                copies.append((0, 0, 0))
        self._sequences[to] = Held(known.owner[:num_tokens], held, tuple(tables))
        return copies

    def now(self) -> Extent:
        """What is held now: :meth:`extent`, without keeping its pages."""
        return dict(self._sequences)

    def extent(self) -> Extent:
        """What is held now, for :meth:`undo`; its pages are kept until :meth:`settle`."""
        for pages in self._pages:
            pages.checkpoint()
        return self.now()

    def settle(self) -> None:
        """Nothing is undone any more: pages that nobody uses are free."""
        for pages in self._pages:
            pages.settle()

    def undo(self, before: Extent) -> None:
        """Take back what happened since the last :meth:`extent`, which said ``before``; or what was
        added since :meth:`now`, where nothing has been written since."""
        self._sequences = dict(before)
        for kind, pages in enumerate(self._pages):
            tables = [known.tables[kind].pages for known in before.values()]
            pages.recount([[of[rank] for of in tables] for rank in range(self.num_ranks)])

    def evict(self, sequence: SequenceId) -> None:
        """Forget a sequence; pages of nothing else are free again. ``ValueError`` for an unknown
        one."""
        tables = self.known(sequence).tables
        del self._sequences[sequence]
        for table, book in zip(tables, self._pages, strict=True):
            for rank, pages in enumerate(table.pages):
                book.release(rank, pages)

    # ------------------------------------------------------------------ pieces

    def _empty(self) -> Held:
        none = np.zeros(self.num_ranks, dtype=np.int64)
        table = Table(0, none, ((),) * self.num_ranks)
        return Held(array(RANK_TYPE), none, (table,) * len(self.kinds))

    def _gone(self, known: Held, kind: int) -> tuple[int, np.ndarray]:
        """The first position that the next token sees, and how many before it each rank has."""
        table = known.tables[kind]
        first = self.kinds[kind].first(known.num_tokens)
        gone = np.bincount(known.owners(table.first, first), minlength=self.num_ranks)
        return first, table.gone + gone

    def _shortened(self, known: Held) -> Held:
        """Without what the next token does not see."""
        tables = [
            table.shortened(book, *self._gone(known, kind), self.page_size)
            for kind, (table, book) in enumerate(zip(known.tables, self._pages, strict=True))
        ]
        return Held(known.owner, known.held, tuple(tables))

    def _new_rows(
        self, sequences: Sequence[SequenceId], before: np.ndarray, kind: int
    ) -> np.ndarray:
        """Rows here of the tokens that were added."""
        rows, size = [np.zeros(0, dtype=np.int64)], self.page_size
        for each, had in zip(sequences, before[:, self.rank].tolist(), strict=True):
            known = self._sequences[each]
            table = known.tables[kind]
            page, row = np.divmod(np.arange(had, known.held[self.rank]), size)
            pages = np.array(table.pages[self.rank], dtype=np.int64)
            rows.append(pages[page - table.gone[self.rank] // size] * size + row)
        return np.concatenate(rows)

    # ------------------------------------------------------------------ checks

    def _check_room(self, more: np.ndarray) -> None:
        """``ValueError`` unless each rank has so many free pages of each kind."""
        for pages in self._pages:
            free = pages.free
            if (more > free).any():
                rank = int((more - free).argmax())
                raise ValueError(
                    f"the KV cache is full: rank {rank} needs {more[rank]} more pages of "
                    f"{self.page_size} tokens and has {free[rank]} of {pages.num_pages}: "
                    "evict a sequence, or make the cache with more pages"
                )

    def _check_share(self, from_: SequenceId, to: SequenceId, num_tokens: int) -> None:
        most = self.known(from_).num_tokens
        if to in self._sequences:
            raise ValueError(f"sequence {to!r} is in the cache already: share with a new one")
        whole("num_tokens", num_tokens, least=1, most=most)
        if not self.keeps(from_, num_tokens):
            raise ValueError(
                f"sequence {from_!r} has gone on, and layers of windows or chunks have forgotten "
                f"what a sequence of its first {num_tokens} tokens would see: share all of its "
                f"{most}, or share before it goes on"
            )

    def _checked(self, sequences: Sequence[SequenceId], owners: Sequence[Any]) -> list[np.ndarray]:
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"a sequence is named twice: {list(sequences)}")
        found = [np.asarray(of) for of in owners]
        if len(found) != len(sequences) or not all(
            of.ndim == 1
            and (of.dtype.kind in "iu" or not len(of))
            and (of >= 0).all()
            and (of < self.num_ranks).all()
            for of in found
        ):
            raise ValueError(
                f"owners must be a rank below {self.num_ranks} for each new token of each of "
                f"{len(sequences)} sequences, got {shown(owners)}"
            )
        return [of.astype(np.int64) for of in found]
