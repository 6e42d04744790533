"""Continuous batching: requests join and leave between steps, long prompts enter in chunks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dcp.checks import whole
from dcp.inference.draws import Part
from dcp.inference.engine import InferenceEngine
from dcp.inference.inputs import Drawn, token_ids
from dcp.inference.requests import Piece, Request
from dcp.inference.texts import Decode, TextStream

# A sequence's tokens on the fullest rank beyond an equal share, see :meth:`Batcher._pages`.
_SLACK = 3


@dataclass(eq=False)
class _Reply:
    """A request under way: its prompt and reply so far, and the seat that it runs on."""

    request: Request
    text: TextStream | None
    tokens: list[int] = field(init=False)
    seat: int = -1

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.tokens)


class Batcher:
    """Steps of an engine, each a turn of whoever is there: decoding and prompts, mixed.

    Who runs, and with how many tokens, follows from what joined and left before each step, so that
    ranks that are told the same do the same.

    - A step takes at most ``token_budget`` tokens: one for each reply under way, then prompts in
      the order of their coming, in chunks where they are longer than what is left.
    - Where the cache is full, requests wait in a queue, first come, first served. Where replies
      outgrow it, the last to have begun goes back to the head of the queue; its tokens are kept,
      and enter the cache again when there is room. What waits at the head is never overtaken.
    - A step that fails leaves no trace, and is taken again request by request: only those that
      fail alone are given up.

    Args:
        engine: without conversations; nothing else may be asked of it meanwhile.
        token_budget: more than twice the number of ranks.
        most_running: requests in a step; by default as many as leave room for a prompt's chunk.
        decode: tokens to text, the same on all ranks; without it pieces have no text, and requests
            with stop texts are refused.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        *,
        token_budget: int = 2048,
        most_running: int | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.engine, self._decode = engine, decode
        self._num_ranks = engine.cluster.num_ranks
        self._grain = 2 * self._num_ranks  # so many tokens are shared out evenly
        self.token_budget = whole("token_budget", token_budget, least=self._grain + 1)
        most = token_budget - self._grain
        self.most_running = whole("most_running", most_running or most, least=1, most=most)
        if engine.names:
            raise ValueError(
                f"the engine has {len(engine.names)} conversations: evict them, or make another"
            )
        cache = engine.attention.caches[0]
        self._num_pages, self._page_size = cache.num_pages, cache.page_size
        self._waiting: deque[_Reply] = deque()
        self._running: list[_Reply] = []  # in the order in which they began
        self._num_steps = 0

    # ------------------------------------------------------------------ who is there

    @property
    def num_waiting(self) -> int:
        """Requests that have joined, and have no place in the cache."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests of which tokens are in the cache, or will be with the next step."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not self._waiting and not self._running

    @property
    def most_tokens(self) -> int:
        """Of prompt and reply together, what fits in the cache and the model's frequencies."""
        fits = (self._num_pages * self._page_size - _SLACK + 1) * self._num_ranks
        return min(fits, self.engine.rotary_limit or fits)

    def check(self, request: Request) -> None:
        """``ValueError`` for a request that could never be served."""
        vocab_size = self.engine.vocab_size
        token_ids(request.id, request.tokens, vocab_size=vocab_size)
        if request.stop and self._decode is None:
            raise ValueError(f"stop={list(request.stop)} needs a tokenizer, and none was given")
        if (request.num_likeliest or 0) > vocab_size:
            raise ValueError(f"the model has {vocab_size} tokens, fewer than the likeliest asked")
        total = len(request.tokens) + request.max_new_tokens
        if total > self.most_tokens:
            raise ValueError(
                f"{len(request.tokens)} tokens of the prompt and {request.max_new_tokens} of the "
                f"reply are more than the {self.most_tokens} that can be kept: ask for fewer, or "
                "serve with more pages"
            )

    def join(self, request: Request) -> None:
        """Queue a request; its id is of no other one here. Raises as :meth:`check` does."""
        self.check(request)
        if any(request.id == reply.request.id for reply in [*self._waiting, *self._running]):
            raise ValueError(f"there is a request {request.id} already")
        text = None if self._decode is None else TextStream(self._decode, request.stop)
        self._waiting.append(_Reply(request, text))

    def leave(self, id: int) -> None:
        """Forget a request, wherever it is; one that has ended is none."""
        for reply in [*self._waiting, *self._running]:
            if reply.request.id == id:
                self._forget(reply)

    def _forget(self, reply: _Reply) -> None:
        if reply in self._waiting:
            self._waiting.remove(reply)
        else:
            self._running.remove(reply)
            self.engine.evict(reply.request.id)

    # ------------------------------------------------------------------ a step

    def step(self) -> list[Piece]:
        """Take one step; what it adds to replies. Raises ``DCPError`` where the ranks are lost."""
        chunks = self._schedule()
        found = self._take([(reply, self._part(reply, count)) for reply, count in chunks])
        self._num_steps += 1
        pieces = [self._piece(reply, drawn) for reply, drawn in found if drawn is not None]
        for piece in pieces:
            if piece.finish is not None:
                self.leave(piece.id)
        return pieces

    def _schedule(self) -> list[tuple[_Reply, int]]:
        """Who takes part in the next step, with how many tokens."""
        while sum(self._pages(len(reply.tokens)) for reply in self._running) > self._num_pages:
            self._put_back(self._running[-1])
        pending = {id(r): self.engine.num_pending(r.request.id) for r in self._running}
        chunks = [(reply, 1) for reply in self._running if pending[id(reply)] == 1]
        left = self.token_budget - len(chunks)
        for reply in self._running:
            if pending[id(reply)] > 1 and (count := self._chunk(pending[id(reply)], left)):
                chunks.append((reply, count))
                left -= count
        while self._waiting and (count := self._chunk(len(self._waiting[0].tokens), left)):
            if not self._has_room(self._waiting[0]):
                break
            chunks.append((self._begin(), count))
            left -= count
        return chunks

    def _chunk(self, pending: int, left: int) -> int:
        """Tokens of a prompt that enter: all, or as many as are shared out evenly."""
        return pending if pending <= left else left - left % self._grain

    def _has_room(self, reply: _Reply) -> bool:
        pages = sum(self._pages(len(each.tokens)) for each in [*self._running, reply])
        return pages <= self._num_pages and len(self._running) < self.most_running

    def _pages(self, tokens: int) -> int:
        """Pages that no rank needs more of for a sequence.

        All of a prompt's chunks but the last are multiples of twice the number of ranks, and give
        each rank as many tokens; the last gives none 2 more than its share, and what follows goes
        round the ranks: 1 more. Rounding included, that is a slack of 3.
        """
        return -(-(tokens // self._num_ranks + _SLACK) // self._page_size)

    def _begin(self) -> _Reply:
        reply = self._waiting.popleft()
        taken = {each.seat for each in self._running}
        reply.seat = next(seat for seat in range(self.most_running) if seat not in taken)
        self._running.append(reply)
        self.engine.say(reply.request.id, reply.tokens)
        return reply

    def _put_back(self, reply: _Reply) -> None:
        self._forget(reply)
        self._waiting.appendleft(reply)

    def _part(self, reply: _Reply, count: int) -> Part:
        """Lone tokens go round the ranks step by step, from a rank of the seat's own."""
        request = reply.request
        is_last = count == self.engine.num_pending(request.id)
        return Part(
            request.id,
            count,
            shift=reply.seat + self._num_steps,
            sampling=request.sampling if is_last else None,
            num_likeliest=request.num_likeliest,
        )

    def _take(
        self, parts: list[tuple[_Reply, Part]]
    ) -> list[tuple[_Reply, Drawn | Exception | None]]:
        """What was drawn for each, or why it failed."""
        if not parts:
            return []
        try:
            drawn = self.engine.step([part for _, part in parts])
        except Exception as error:
            if self.engine.is_lost:
                raise
            if len(parts) == 1:
                return [(parts[0][0], error)]
            return [found for each in parts for found in self._take([each])]
        return list(zip([reply for reply, _ in parts], drawn, strict=True))

    def _piece(self, reply: _Reply, drawn: Drawn | Exception) -> Piece:
        request, text = reply.request, ""
        if isinstance(drawn, Exception):
            said = " ".join(str(drawn).split()) or type(drawn).__name__
            return Piece(request.id, None, finish="error", error=said)
        reply.tokens.append(drawn.token)
        finish = "length" if reply.num_new == request.max_new_tokens else None
        if drawn.token in request.stop_tokens:
            finish = "stop"
        elif reply.text is not None:
            text = reply.text.add(drawn.token)
        if reply.text is not None:
            if finish is not None:
                text += reply.text.end()
            if reply.text.is_stopped:
                finish = "stop"
        return Piece(request.id, drawn, text, finish)
