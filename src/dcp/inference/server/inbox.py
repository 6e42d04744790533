"""Between the thread that speaks HTTP and the one that runs the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter

from dcp.inference.batching import Batcher
from dcp.inference.requests import Orders, Piece, Request
from dcp.inference.server.metrics import Metrics

BEAT_SECONDS = 1.0  # of the ranks while there is nothing to do: one that died is noticed


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class Draining(RuntimeError):
    """The server ends, and takes no more requests."""


@dataclass(eq=False)
class Ticket:
    """A request that was taken in, and what comes of it; belongs to one event loop."""

    request: Request
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    last: float = field(default_factory=perf_counter)  # when it came, then when a token did
    has_begun: bool = False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self.pieces.get()
            yield piece
            if piece.finish is not None:
                return


class Inbox:
    """Requests in, pieces out.

    Args:
        max_queue: requests that may wait while others run.
    """

    def __init__(self, batcher: Batcher, *, max_queue: int, metrics: Metrics) -> None:
        self._batcher, self._max_queue, self._metrics = batcher, max_queue, metrics
        self._changed = threading.Condition()
        self._tickets: dict[int, Ticket] = {}  # of requests that have not ended
        self._joins: dict[int, Request] = {}  # that the ranks have not heard of
        self._leaves: list[int] = []
        self._ids = count()
        self._is_draining = False

    # ------------------------------------------------------------------ the side of HTTP

    @property
    def is_draining(self) -> bool:
        """Whether no more requests are taken in."""
        return self._is_draining

    def submit(self, request: Request) -> Ticket:
        """Take a request in, under an id of its own; called in the event loop that reads it.

        Raises ``ValueError`` for one that can never be served, :class:`QueueFull` and
        :class:`Draining`.
        """
        self._batcher.check(request)
        with self._changed:
            if self._is_draining:
                raise Draining("the server is ending: ask another one")
            if len(self._tickets) - self._batcher.num_running >= self._max_queue:
                raise QueueFull(f"{self._max_queue} requests are waiting: try again later")
            ticket = Ticket(replace(request, id=next(self._ids)))
            self._joins[ticket.request.id] = ticket.request
            self._tickets[ticket.request.id] = ticket
            self._changed.notify()
        self._metrics.prompt_tokens.inc(len(request.tokens))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this one any more; of no effect where it has ended."""
        with self._changed:
            if self._tickets.pop(ticket.request.id, None) is None:
                return
            if self._joins.pop(ticket.request.id, None) is None:
                self._leaves.append(ticket.request.id)
            self._changed.notify()
        self._metrics.ended("cancelled")

    def drain(self) -> None:
        """Take no more requests; end when all have ended."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    # ------------------------------------------------------------------ the side of the engine

    def take(self, *, can_wait: bool) -> Orders:
        """What changed since the last call; with ``can_wait``, after a beat if nothing does."""
        with self._changed:
            if can_wait and not (self._joins or self._leaves or self._is_over()):
                self._changed.wait(BEAT_SECONDS)
            orders = Orders(tuple(self._leaves), tuple(self._joins.values()), self._is_over())
            self._leaves, self._joins = [], {}
            return orders

    def _is_over(self) -> bool:
        return self._is_draining and not self._tickets

    def deliver(self, pieces: Sequence[Piece]) -> None:
        """Hand pieces to those who wait for them."""
        for piece in pieces:
            with self._changed:
                ticket = self._tickets.get(piece.id)
                if piece.finish is not None:
                    self._tickets.pop(piece.id, None)
            if ticket is not None:  # else it was cancelled
                self._note(ticket, piece)
                ticket.loop.call_soon_threadsafe(ticket.pieces.put_nowait, piece)
        self._metrics.gauge(self._batcher, num_open=len(self._tickets))

    def fail(self, why: str) -> None:
        """Tell all who wait that nothing will come any more."""
        self._is_draining = True
        self.deliver([Piece(each, None, finish="error", error=why) for each in [*self._tickets]])

    def _note(self, ticket: Ticket, piece: Piece) -> None:
        now = perf_counter()
        if piece.drawn is not None:
            kind = self._metrics.later_token if ticket.has_begun else self._metrics.first_token
            kind.observe(now - ticket.last)
            ticket.has_begun, ticket.last = True, now
            self._metrics.new_tokens.inc()
        if piece.finish is not None:
            self._metrics.ended(piece.finish)
