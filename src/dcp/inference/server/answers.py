"""Replies in the shapes of OpenAI's two routes, whole or piece by piece."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from uuid import uuid4

from dcp.inference.inputs import Drawn
from dcp.inference.requests import Piece, Request

Json = dict[str, Any]


@dataclass
class Answer(ABC):
    """One reply on its way. Subclasses say what the two routes write differently.

    Args:
        model: its name.
        show: the text of a token.
        with_ids: whether token ids are told.
    """

    request: Request
    model: str
    show: Callable[[int], str]
    with_ids: bool
    num_new: int = 0
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    object = chunk_object = prefix = ""

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """All pieces as one answer."""
        self.num_new = sum(piece.drawn is not None for piece in pieces)
        text = "".join(piece.text for piece in pieces)
        choice = self._choice(pieces) | self.said(text)
        return self._frame(self.object, [choice]) | {"usage": self.usage()}

    def chunk(self, piece: Piece) -> Json | None:
        """A piece as one event; None where it has nothing to tell yet."""
        self.num_new += piece.drawn is not None
        tells = piece.text or piece.finish or self.with_ids
        if not tells and self.request.num_likeliest is None:
            return None
        return self._frame(self.chunk_object, [self._choice([piece]) | self.added(piece.text)])

    def usage_chunk(self) -> Json:
        """The event behind the last piece that counts tokens, for those who ask for it."""
        return self._frame(self.chunk_object, []) | {"usage": self.usage()}

    def usage(self) -> Json:
        prompt = len(self.request.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_new,
            "total_tokens": prompt + self.num_new,
        }

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, pieces: Sequence[Piece]) -> Json:
        drawn = [piece.drawn for piece in pieces if piece.drawn is not None]
        told = self.request.num_likeliest is not None
        choice: Json = {
            "index": 0,
            "logprobs": self.logprobs(drawn) if told else None,
            "finish_reason": pieces[-1].finish,
        }
        return choice | ({"token_ids": [each.token for each in drawn]} if self.with_ids else {})

    @abstractmethod
    def said(self, text: str) -> Json:
        """A whole text."""

    @abstractmethod
    def added(self, text: str) -> Json:
        """A piece of it."""

    @abstractmethod
    def logprobs(self, drawn: Sequence[Drawn]) -> Json:
        """Log-probabilities of some tokens."""


class CompletionAnswer(Answer):
    """Of ``/v1/completions``."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"
    _offset = 0

    def said(self, text: str) -> Json:
        return {"text": text}

    added = said

    def logprobs(self, drawn: Sequence[Drawn]) -> Json:
        tokens = [self.show(each.token) for each in drawn]
        *offsets, self._offset = accumulate(map(len, tokens), initial=self._offset)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in drawn],
            "top_logprobs": [
                {self.show(token): value for token, value in each.likeliest} for each in drawn
            ],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    _has_begun = False

    def said(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def added(self, text: str) -> Json:
        role = {} if self._has_begun else {"role": "assistant"}
        self._has_begun = True
        return {"delta": role | {"content": text}}

    def logprobs(self, drawn: Sequence[Drawn]) -> Json:
        entries = [
            self._entry(each.token, each.logprob)
            | {"top_logprobs": [self._entry(*other) for other in each.likeliest]}
            for each in drawn
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        text = self.show(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
