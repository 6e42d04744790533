"""What OpenAI's clients ask, as they write it; what this server does not do is refused by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

# Fields that are known and not served, and the values that ask for nothing.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Shape):
    """``stream_options``."""

    include_usage: bool = False


class Asked(_Shape, ABC):
    """What both routes take.

    ``top_k`` and ``return_token_ids`` are not OpenAI's: clients give them as ``extra_body``.
    ``user`` changes no reply.
    """

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        """Drop what asks for nothing; refuse what cannot be honoured."""
        if not isinstance(values, dict):
            return values
        for name, neutral in _NOT_SERVED.items():
            value = values.get(name)
            if value is not None and value not in neutral:
                raise PydanticCustomError(
                    "not_served", "{name} is not served: leave it out", {"name": name}
                )
        return {name: value for name, value in values.items() if name not in _NOT_SERVED}

    @property
    @abstractmethod
    def num_likeliest(self) -> int | None:
        """Log-probabilities wanted beside each token's own; None: none at all."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionAsked(Asked):
    """``POST /v1/completions``: a text or tokens to go on from."""

    prompt: str | list[int] | list[str]
    logprobs: int | None = None

    @property
    def num_likeliest(self) -> int | None:
        return self.logprobs


class ChatAsked(Asked):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def num_likeliest(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise ValueError("top_logprobs needs logprobs=true")
            return None
        return self.top_logprobs or 0
