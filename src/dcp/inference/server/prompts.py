"""What clients ask as requests of the engine: prompts as tokens, defaults, limits."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dcp.data.chat_template import ChatEncoder, checked_messages
from dcp.data.tokenizers import Tokenizer
from dcp.inference.inputs import Sampling
from dcp.inference.rank import said
from dcp.inference.requests import Request
from dcp.inference.server.shapes import Asked, ChatAsked, CompletionAsked

COMPLETION_TOKENS = 16  # of a completion that does not say how many it wants, as OpenAI's
MOST_SEED = 2**63


class TooLong(ValueError):
    """Prompt and reply are more tokens than are served."""


@dataclass(frozen=True)
class Prompts:
    """Makes requests of what clients ask; safe to call from several threads.

    Args:
        begin, ends: the token that begins a text, and those that end a reply.
        max_length: tokens of prompt and reply together.
    """

    tokenizer: Tokenizer
    begin: int | None
    ends: tuple[int, ...]
    max_length: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer.for_transformers())

    def request(self, asked: Asked) -> Request:
        """The request, without an id yet; ``ValueError`` for what cannot be asked."""
        if asked.stream_options is not None and not asked.stream:
            raise ValueError("stream_options needs stream=true")
        with self._lock:  # tokenizers keep state
            tokens = self._chat(asked) if isinstance(asked, ChatAsked) else self._text(asked)
        return Request(
            id=0,
            tokens=tuple(tokens),
            max_new_tokens=self._max_new_tokens(asked, len(tokens)),
            sampling=_sampling(asked),
            stop=asked.stops,
            stop_tokens=self.ends,
            num_likeliest=asked.num_likeliest,
        )

    def show(self, token: int) -> str:
        """The text of one token."""
        with self._lock:
            return self.tokenizer.decode(np.array([token], dtype=np.int64))

    def _text(self, asked: Asked) -> list[int]:
        assert isinstance(asked, CompletionAsked)
        prompt: Any = asked.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, list):
            if any(isinstance(each, str) for each in prompt):
                raise ValueError(f"prompt has {len(prompt)} texts: ask for one at a time")
            return prompt
        end = self.ends[0] if self.ends else None
        return said(self.tokenizer, prompt, begin=self.begin, end=end, later=False)

    def _chat(self, asked: ChatAsked) -> list[int]:
        messages = checked_messages([*map(_as_text, asked.messages)], "messages")
        return self._encoder.messages(messages, "messages", add_generation_prompt=True)

    def _max_new_tokens(self, asked: Asked, num_tokens: int) -> int:
        left = self.max_length - num_tokens
        wanted = asked.max_tokens
        if isinstance(asked, ChatAsked):
            if asked.max_completion_tokens is not None:
                if wanted is not None:
                    raise ValueError("max_tokens and max_completion_tokens: give one of them")
                wanted = asked.max_completion_tokens
            wanted = max(left, 1) if wanted is None else wanted
        elif wanted is None:
            wanted = COMPLETION_TOKENS
        if wanted > left:
            raise TooLong(
                f"{num_tokens} tokens of the prompt and {wanted} of the reply are more than the "
                f"{self.max_length} that are served"
            )
        return wanted


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts, if all are texts, are one: few templates read parts."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    ):
        return message
    return message | {"content": "".join(part["text"] for part in parts)}


def _sampling(asked: Asked) -> Sampling:
    """As with OpenAI, what is not said is temperature 1 and a seed of chance."""
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=secrets.randbelow(MOST_SEED) if asked.seed is None else asked.seed,
    )
