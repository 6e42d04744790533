"""Pages for replies: reckoned before they are needed, shared where prompts begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dcp.inference.engine import InferenceEngine
from dcp.inference.requests import Request
from dcp.inference.texts import TextStream

# A sequence's tokens on the fullest rank beyond an equal share, see :meth:`Room.has_for`.
_SLACK = 3


@dataclass(eq=False)
class Reply:
    """A request under way: its prompt and reply so far, and the seat that it runs on."""

    request: Request
    text: TextStream | None
    tokens: list[int] = field(init=False)
    seat: int = -1
    skew: int = 0  # tokens of a shared prefix on the fullest rank beyond an equal share

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.tokens)


class Room:
    """The cache of an engine, as replies under way and conversations that have ended share it.

    Args:
        most_kept: conversations that have ended and stay, for prompts that begin like them, as long
            as nobody needs their pages.
    """

    def __init__(self, engine: InferenceEngine, *, most_kept: int) -> None:
        self._engine, self._cache = engine, engine.attention.caches[0]
        self._num_ranks = engine.cluster.num_ranks
        self._most_kept = most_kept
        self._rows = self._cache.num_pages * self._cache.page_size
        self._kept: list[int] = []  # the one that was of use last at the end
        self.num_shared_tokens = 0

    @property
    def grain(self) -> int:
        """So many tokens of a prompt, and multiples of them, are shared out evenly."""
        return 2 * self._num_ranks

    @property
    def most_tokens(self) -> int:
        """Of one prompt and reply together, what fits in the cache and the model's frequencies."""
        fits = (self._rows - _SLACK + 1) * self._num_ranks - 1
        return min(fits, self._engine.rotary_limit or fits)

    @property
    def num_kept(self) -> int:
        """Conversations that have ended, and whose tokens are still there."""
        return len(self._kept)

    def has_for(self, replies: Sequence[Reply]) -> bool:
        """Whether all of their tokens so far fit side by side, whatever else is dropped.

        All of a prompt's chunks but the last are multiples of the grain, and give each rank as many
        tokens; the last gives none 2 more than its share, and what follows goes round the ranks: 1
        more. Rounding included, that is a slack of 3.
        """
        rows = [self._share_of(len(reply.tokens), reply.skew) for reply in replies]
        size = self._cache.page_size
        return sum(-(-count // size) for count in rows) <= self._cache.num_pages

    def _share_of(self, tokens: int, skew: int) -> int:
        return tokens // self._num_ranks + skew + _SLACK

    def begin(self, reply: Reply, *, running: Sequence[Reply]) -> None:
        """Make a reply a conversation of the engine, on pages of another where it begins alike."""
        reply.skew = 0
        name, count = self._engine.longest_prefix(reply.tokens[:-1])
        if name is None or not self._can_share(reply, name, count, running):
            self._engine.say(reply.request.id, reply.tokens)
            return
        then = reply.tokens[count:]
        self._engine.fork(reply.request.id, from_=name, num_tokens=count, then=then)
        self.num_shared_tokens += count
        if name in self._kept:
            self._kept.remove(int(name))
            self._kept.append(int(name))

    def _can_share(
        self, reply: Reply, name: int | str, count: int, running: Sequence[Reply]
    ) -> bool:
        """Whether a prefix is worth it, and fits for all that is to come though it is uneven."""
        if count < self._cache.page_size:
            return False
        most = int(np.bincount(self._cache.known(name).owners(0, count)).max())
        reply.skew = most - count // self._num_ranks
        total = len(reply.request.tokens) + reply.request.max_new_tokens
        fits = self._share_of(total, reply.skew) <= self._rows and self.has_for([*running, reply])
        others = [each for each in self._kept if each != name]
        while fits and others and not self._cache.free_pages.all():  # for the copy of the last page
            self.drop(others.pop(0))
        if fits and self._cache.free_pages.all():
            return True
        reply.skew = 0
        return False

    def make(self, chunks: Sequence[tuple[Reply, int]]) -> None:
        """Drop conversations that have ended until these replies can take so many tokens more."""
        size = self._cache.page_size
        counts = np.array([count for _, count in chunks], dtype=np.int64)
        held = self._cache.held([reply.request.id for reply, _ in chunks])
        most = held + 2 * -(-counts // self.grain)[:, None]
        need = (-(-most // size) + (-held // size)).sum(axis=0)
        while self._kept and (self._cache.free_pages < need).any():
            self.drop(self._kept[0])

    def keep(self, id: int) -> None:
        """A conversation has ended, and may stay."""
        self._kept.append(id)
        if len(self._kept) > self._most_kept:
            self.drop(self._kept[0])

    def drop(self, id: int) -> None:
        """Forget a conversation that has ended, if there is one of this id."""
        if id in self._kept:
            self._kept.remove(id)
            self._engine.evict(id)

    def drop_all(self) -> None:
        """Forget all conversations that have ended."""
        for id in [*self._kept]:
            self.drop(id)
