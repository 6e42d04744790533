"""Tokens to text as they come: whole characters only, and never the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Decode = Callable[[np.ndarray], str]
_HALF = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows a character whose end is still to come


class TextStream:
    """The text of a reply, token by token.

    All pieces joined are the text, whether a client reads them one by one or together.

    Attributes:
        is_stopped: a stop text was found; what precedes it has been given, nothing follows.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        # tokens before `_given` are given; a decoder looks at those from `_window` on, as in some
        # vocabularies a token's text depends on the one before it
        self._window = self._given = 0
        self._held = ""  # of the text, what may begin a stop text
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What can be told now."""
        self._tokens.append(token)
        text = self._text(self._window, None)
        return "" if text.endswith(_HALF) else self._release(self._new(text), at_end=False)

    def end(self) -> str:
        """The rest: characters that never got their end, and what was held back."""
        return self._release(self._new(self._text(self._window, None)), at_end=True)

    def _text(self, first: int, end: int | None) -> str:
        return self._decode(np.array(self._tokens[first:end], dtype=np.int64))

    def _new(self, text: str) -> str:
        """What ``text`` of the window has beyond what was given."""
        new = text[len(self._text(self._window, self._given)) :]
        self._window, self._given = self._given, len(self._tokens)
        return new

    def _release(self, new: str, *, at_end: bool) -> str:
        if self.is_stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if at_end else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that begin ``stop``, but are not all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
