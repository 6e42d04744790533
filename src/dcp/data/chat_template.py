"""Strings and messages as tokens, and which of them an assistant wrote.

A template with ``{% generation %}`` blocks says itself which tokens those are. Under any other, the
tokens of an assistant's message are those that it adds to the conversation before it and the
generation prompt, up to the end of its turn (in most templates, a line's end behind the stop
token). That is exact, and used, only where the template lets a conversation's beginning stay as it
was when messages follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcp.data.files import first_line

ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
Messages = list[dict[str, Any]]


def checked_messages(value: Any, name: str) -> Messages:
    """Messages without their empty keys; ``ValueError`` where one lacks a role or content.

    Args:
        name: what they are, for messages, such as ``"messages of record 3"``.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of messages, got {value!r:.60}")
    if not value:
        raise ValueError(f"{name} holds no message: remove the record")
    return [_checked(message, f"message {i} of {name}") for i, message in enumerate(value)]


def _checked(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be a mapping with role and content, got {message!r:.60}")
    entries = {k: v for k, v in message.items() if v is not None}  # Parquet has all keys in all
    found = ", ".join(map(str, entries)) or "nothing"
    if not isinstance(entries.get("role"), str):
        raise ValueError(f"{name} has no 'role' but {found}: give 'role' and 'content'")
    if "content" not in entries and not entries.get("tool_calls"):
        raise ValueError(f"{name} has no 'content' but {found}: give 'role' and 'content'")
    parts = entries.get("content", "")
    for part in parts if isinstance(parts, (list, tuple)) else ():
        if (kind := part.get("type") if isinstance(part, Mapping) else part) != "text":
            raise ValueError(f"{name} has a part {kind!r:.40}: chats are read as text alone")
    if entries.pop("weight", 1) != 1:
        raise ValueError(f"{name} has weight {message['weight']!r}, and only 1 can be honoured")
    return entries


class ChatEncoder:
    """Tokens of strings and messages.

    Args:
        tokenizer: of transformers, or with its ``__call__`` and ``apply_chat_template``.
        add_eos: strings end with the tokenizer's end token, where it has one, so that a model
            learns to stop; templates end turns by themselves.

    All methods raise ``ValueError`` with ``where``, which names the record.
    """

    def __init__(self, tokenizer: Any, *, add_eos: bool = True) -> None:
        self._tokenizer, self._add_eos = tokenizer, add_eos
        self._eos = getattr(tokenizer, "eos_token_id", None)

    def text(self, text: Any, where: str) -> list[int]:
        """Tokens of a string, with the tokenizer's own special ones."""
        return self._ended(self._plain(text, where))

    def split_text(self, prompt: Any, answer: Any, where: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt, and of what follows it.

        Those of both together where they begin with the prompt's; else (a token would span the
        boundary) the answer is encoded by itself, as a model goes on from a prompt's tokens.
        """
        first = self._plain(prompt, where)
        if first[-1:] == [self._eos] and not prompt.endswith(str(self._tokenizer.eos_token)):
            first.pop()  # the tokenizer ends every string so; the prompt goes on
        joined = self._plain(prompt + self._string(answer, where), where)
        if joined[: len(first)] == first:
            return first, self._ended(joined[len(first) :])
        return first, self._ended(self._plain(answer, where, add_special_tokens=False))

    def messages(self, messages: Messages, where: str, **options: Any) -> list[int]:
        """Tokens of messages; ``options`` go to the template."""
        return self._ids(self._rendered(messages, where, **options))

    def split_messages(
        self, prompt: Messages, answer: Messages, where: str, **options: Any
    ) -> tuple[list[int], list[int]]:
        """Tokens of a prompt with its generation prompt, and of what follows it."""
        tokens = self.messages([*prompt, *answer], where, **options)
        start = self._beginning(tokens, prompt, where, add_generation_prompt=True, **options)
        return tokens[:start], tokens[start:]

    def marked(
        self, messages: Messages, where: str, **options: Any
    ) -> tuple[list[int], np.ndarray]:
        """Tokens of messages, and which of them an assistant wrote: bool ``[n]``."""
        if self._marks_itself(options):
            encoded = self._rendered(messages, where, return_assistant_tokens_mask=True, **options)
            mask = np.asarray(encoded["assistant_masks"], dtype=bool)
            if mask.any():
                return self._ids(encoded), mask
        tokens = self.messages(messages, where, **options)
        mask = np.zeros(len(tokens), dtype=bool)
        for i in (i for i, message in enumerate(messages) if message["role"] == ASSISTANT):
            if i == 0:
                raise ValueError(
                    f"{where} begins with an assistant's message, of which a chat template without "
                    f"{{% generation %}} does not tell the first token: put a message before it"
                )
            start = self._beginning(
                tokens, messages[:i], where, add_generation_prompt=True, **options
            )
            through = messages[: i + 1]
            ends = i + 1 == len(messages)
            stop = len(tokens) if ends else self._beginning(tokens, through, where, **options)
            mask[start:stop] = True
        return tokens, mask

    def _beginning(self, tokens: list[int], messages: Messages, where: str, **options: Any) -> int:
        """Tokens of the first messages of a conversation, which must begin with just these."""
        first = self.messages(messages, where, **options)
        if tokens[: len(first)] != first:
            raise ValueError(
                f"the chat template writes the first {len(messages)} messages of {where} otherwise "
                f"when more follow, so that no exact mask of the answers exists: use a template "
                f"with {{% generation %}} blocks and 'messages', or learn all tokens"
            )
        return len(first)

    def _marks_itself(self, options: Mapping[str, Any]) -> bool:
        template = getattr(self._tokenizer, "chat_template", None)
        if hasattr(self._tokenizer, "get_chat_template"):
            template = self._tokenizer.get_chat_template(tools=options.get("tools"))
        fast = getattr(self._tokenizer, "is_fast", True)  # others do not tell offsets
        return fast and isinstance(template, str) and bool(_GENERATION.search(template))

    def _rendered(self, messages: Messages, where: str, **options: Any) -> Any:
        tokenizer = self._tokenizer
        has_none = getattr(tokenizer, "chat_template", "unknown") is None
        if has_none or not hasattr(tokenizer, "apply_chat_template"):
            raise ValueError(
                f"the tokenizer has no chat template, by which messages of {where} would be "
                f"written: set its chat_template, or take the tokenizer of a chat model"
            )
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, **options
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(
                f"the chat template cannot write {where}: {first_line(error)}"
            ) from error

    def _plain(self, text: Any, where: str, **options: Any) -> list[int]:
        return self._ids(self._tokenizer(self._string(text, where), **options))

    def _ended(self, tokens: list[int]) -> list[int]:
        if not self._add_eos or self._eos is None or tokens[-1:] == [self._eos]:
            return tokens
        return [*tokens, self._eos]

    @staticmethod
    def _string(text: Any, where: str) -> str:
        if not isinstance(text, str):
            raise ValueError(f"{where} has {text!r:.60} where a string is needed")
        return text

    @staticmethod
    def _ids(encoded: Any) -> list[int]:
        return [int(token) for token in encoded["input_ids"]]
