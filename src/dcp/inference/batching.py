"""Continuous batching: requests join and leave between steps, long prompts enter in chunks."""

from __future__ import annotations

from collections import deque

from dcp.checks import whole
from dcp.inference.draws import Part
from dcp.inference.engine import InferenceEngine
from dcp.inference.inputs import Drawn, token_ids
from dcp.inference.requests import Piece, Request
from dcp.inference.room import Reply, Room
from dcp.inference.texts import Decode, TextStream


class Batcher:
    """Steps of an engine, each a turn of whoever is there: decoding and prompts, mixed.

    Who runs, and with how many tokens, follows from what joined and left before each step, so that
    ranks that are told the same do the same.

    - A step takes at most ``token_budget`` tokens: one for each reply under way, then prompts in
      the order of their coming, in chunks where they are longer than what is left.
    - Where the cache is full, requests wait in a queue, first come, first served. Where replies
      outgrow it, the last to have begun goes back to the head of the queue; its tokens are kept,
      and enter the cache again when there is room. What waits at the head is never overtaken.
    - A prompt that begins like a conversation in the cache, for a page or more, shares its pages.
      Conversations that have ended stay for that purpose, ``most_kept`` at most, as long as nobody
      needs their pages.
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
        most_kept: int = 64,
        decode: Decode | None = None,
    ) -> None:
        self.engine, self._decode = engine, decode
        if engine.names:
            raise ValueError(
                f"the engine has {len(engine.names)} conversations: evict them, or make another"
            )
        self.room = Room(engine, most_kept=whole("most_kept", most_kept))
        self.token_budget = whole("token_budget", token_budget, least=self.room.grain + 1)
        most = token_budget - self.room.grain
        self.most_running = whole("most_running", most_running or most, least=1, most=most)
        self._waiting: deque[Reply] = deque()
        self._running: list[Reply] = []  # in the order in which they began
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

    def check(self, request: Request) -> None:
        """``ValueError`` for a request that could never be served."""
        vocab_size = self.engine.vocab_size
        token_ids(request.id, request.tokens, vocab_size=vocab_size)
        if request.stop and self._decode is None:
            raise ValueError(f"stop={list(request.stop)} needs a tokenizer, and none was given")
        if (request.num_likeliest or 0) > vocab_size:
            raise ValueError(f"the model has {vocab_size} tokens, fewer than the likeliest asked")
        total = len(request.tokens) + request.max_new_tokens
        if total > self.room.most_tokens:
            raise ValueError(
                f"{len(request.tokens)} tokens of the prompt and {request.max_new_tokens} of the "
                f"reply are more than the {self.room.most_tokens} that can be kept: ask for fewer, "
                "or serve with more pages"
            )

    def join(self, request: Request) -> None:
        """Queue a request; its id is of no other one here. Raises as :meth:`check` does."""
        self.check(request)
        if any(request.id == reply.request.id for reply in [*self._waiting, *self._running]):
            raise ValueError(f"there is a request {request.id} already")
        self.room.drop(request.id)  # an earlier one of this id
        text = None if self._decode is None else TextStream(self._decode, request.stop)
        self._waiting.append(Reply(request, text))

    def leave(self, id: int) -> None:
        """Forget a request, wherever it is; one that has ended is none."""
        for reply in [*self._waiting, *self._running]:
            if reply.request.id == id:
                self._forget(reply)

    def _forget(self, reply: Reply) -> None:
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
                self._end(piece)
        return pieces

    def _end(self, piece: Piece) -> None:
        if piece.finish == "error":
            self.leave(piece.id)
        else:
            self._running = [reply for reply in self._running if reply.request.id != piece.id]
            self.room.keep(piece.id)

    def _schedule(self) -> list[tuple[Reply, int]]:
        """Who takes part in the next step, with how many tokens."""
        while not self.room.has_for(self._running):
            self._put_back(self._running[-1])
        pending = {id(r): self.engine.num_pending(r.request.id) for r in self._running}
        chunks = [(reply, 1) for reply in self._running if pending[id(reply)] == 1]
        left = self.token_budget - len(chunks)
        for reply in self._running:
            if pending[id(reply)] > 1 and (count := self._chunk(pending[id(reply)], left)):
                chunks.append((reply, count))
                left -= count
        while self._waiting and self._chunk(len(self._waiting[0].tokens), left):
            if not self._has_place(self._waiting[0]):
                break
            reply = self._begin()
            count = self._chunk(self.engine.num_pending(reply.request.id), left)
            chunks.append((reply, count))
            left -= count
        self.room.make(chunks)
        return chunks

    def _chunk(self, pending: int, left: int) -> int:
        """Tokens of a prompt that enter: all, or as many as are shared out evenly."""
        return pending if pending <= left else left - left % self.room.grain

    def _has_place(self, reply: Reply) -> bool:
        has_seat = len(self._running) < self.most_running
        return has_seat and self.room.has_for([*self._running, reply])

    def _begin(self) -> Reply:
        reply = self._waiting.popleft()
        taken = {each.seat for each in self._running}
        reply.seat = next(seat for seat in range(self.most_running) if seat not in taken)
        self.room.begin(reply, running=self._running)
        self._running.append(reply)
        return reply

    def _put_back(self, reply: Reply) -> None:
        self._forget(reply)
        reply.skew = 0
        self._waiting.appendleft(reply)

    def _part(self, reply: Reply, count: int) -> Part:
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
        self, parts: list[tuple[Reply, Part]]
    ) -> list[tuple[Reply, Drawn | Exception | None]]:
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

    def _piece(self, reply: Reply, drawn: Drawn | Exception) -> Piece:
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
