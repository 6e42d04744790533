"""Who uses which page of every rank's pool: books that all ranks keep alike."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np


class Pages:
    """Pages of one kind of layers, on all ranks; each may have several users.

    A page that nobody uses is free, and low pages are taken first, so that runs are long. Pages in
    use at a :meth:`checkpoint` stay as they are until :meth:`settle`, whoever lets go of them:
    :meth:`recount` can give them back to their users.
    """

    def __init__(self, num_pages: int, num_ranks: int) -> None:
        self.num_pages, self.num_ranks = num_pages, num_ranks
        self._users: list[Counter[int]] = [Counter() for _ in range(num_ranks)]
        self._returned: list[list[int]] = [[] for _ in range(num_ranks)]  # heaps
        self._unused = [0] * num_ranks  # this page and those above were never taken
        self._is_open = False  # between a checkpoint and the settling
        self._taken: list[set[int]] = [set() for _ in range(num_ranks)]  # since the checkpoint
        self._waiting: list[set[int]] = [set() for _ in range(num_ranks)]  # for the settling

    @property
    def free(self) -> np.ndarray:
        """Pages of each rank that can be taken, int64 ``[num_ranks]``."""
        never = self.num_pages - np.array(self._unused, dtype=np.int64)
        free: np.ndarray = never + [len(heap) for heap in self._returned]
        return free

    def users(self, rank: int, page: int) -> int:
        return self._users[rank][page]

    def take(self, rank: int, count: int) -> tuple[int, ...]:
        """Free pages, for one user."""
        heap, pages = self._returned[rank], []
        for _ in range(count):
            if heap:
                pages.append(heapq.heappop(heap))
            else:
                pages.append(self._unused[rank])
                self._unused[rank] += 1
        assert self._unused[rank] <= self.num_pages, "more pages than are free"
        if self._is_open:
            self._taken[rank].update(pages)
        self._users[rank].update(pages)
        return tuple(pages)

    def share(self, rank: int, pages: Iterable[int]) -> None:
        """One more user of pages that are in use."""
        self._users[rank].update(pages)

    def release(self, rank: int, pages: Iterable[int]) -> None:
        """One user fewer."""
        for page in pages:
            self._users[rank][page] -= 1
            if self._users[rank][page]:
                continue
            del self._users[rank][page]
            if self._is_open and page not in self._taken[rank]:
                self._waiting[rank].add(page)
            else:
                self._taken[rank].discard(page)
                heapq.heappush(self._returned[rank], page)

    def checkpoint(self) -> None:
        """From now on, pages in use now are kept."""
        self.settle()
        self._is_open = True

    def settle(self) -> None:
        """Pages are not given back any more: those that nobody uses are free."""
        self._is_open = False
        for rank in range(self.num_ranks):
            for page in self._waiting[rank]:
                heapq.heappush(self._returned[rank], page)
            self._waiting[rank].clear()
            self._taken[rank].clear()

    def recount(self, used: Sequence[Iterable[Sequence[int]]]) -> None:
        """The users are these: of each rank, the pages of every user."""
        for rank, tables in enumerate(used):
            self._users[rank] = Counter(chain(*tables))
            now = self._users[rank].keys()
            self._unused[rank] = max(self._unused[rank], max(now, default=-1) + 1)
            self._waiting[rank] -= now
            self._taken[rank] &= now
            taken = now | self._waiting[rank]
            self._returned[rank] = [p for p in range(self._unused[rank]) if p not in taken]
