"""What has been said, conversation by conversation, and how it is kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcp.checks import whole
from dcp.inference.inputs import token_ids
from dcp.wire import exactly, pack, reading, unpack

Name = str | int
# tokens and pending ones of each conversation, turns, slots
Extent = tuple[dict[Name, tuple[int, int]], int, int]
_STATE = "conversations"


@dataclass
class Conversation:
    """All tokens so far, and how many of them, the last ones, are not in the cache yet."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    num_pending: int = 0

    @property
    def num_cached(self) -> int:
        return len(self.tokens) - self.num_pending


class Conversations(dict[Name, Conversation]):
    """All conversations by name, and how many turns and conversations there have been."""

    num_turns = num_slots = 0

    def say(self, name: Name, tokens: Sequence[int]) -> None:
        """Add tokens to a conversation, or begin it; they are pending."""
        if name not in self:
            self[name] = Conversation(self.num_slots)
            self.num_slots += 1
        self[name].tokens += tokens
        self[name].num_pending += len(tokens)

    def known(self, name: Name) -> Conversation:
        """A conversation; ``ValueError`` for an unknown one."""
        if name not in self:
            raise ValueError(f"there is no conversation {name!r}")
        return self[name]

    def checked(
        self, prompts: Mapping[Any, Sequence[int]], *, vocab_size: int
    ) -> dict[Name, list[int]]:
        """What is to be said to each; ``ValueError`` for what cannot be."""
        if not isinstance(prompts, Mapping):
            raise ValueError(f"prompts must map names to tokens, got a {type(prompts).__name__}")
        said = {}
        for name, prompt in prompts.items():
            check_name(name)
            said[name] = token_ids(name, prompt, vocab_size=vocab_size)
            if not said[name] and name not in self:
                raise ValueError(f"conversation {name!r} is new and its prompt is empty")
        return said

    def extent(self) -> Extent:
        """How far everything is, for :meth:`undo`."""
        kept = {name: (len(c.tokens), c.num_pending) for name, c in self.items()}
        return kept, self.num_turns, self.num_slots

    def undo(self, before: Extent) -> None:
        """Forget all that was said since :meth:`extent`."""
        kept, self.num_turns, self.num_slots = before
        for name in set(self) - set(kept):
            del self[name]
        for name, (count, pending) in kept.items():
            del self[name].tokens[count:]
            self[name].num_pending = pending

    def pack(self) -> bytes:
        """A message for :meth:`unpack`."""
        state = {
            "conversations": [[name, c.slot, c.tokens, c.num_pending] for name, c in self.items()],
            "num_turns": self.num_turns,
            "num_slots": self.num_slots,
        }
        return pack(_STATE, state, {})

    @classmethod
    def unpack(cls, message: bytes) -> Conversations:
        """What :meth:`pack` wrote; :class:`dcp.wire.WireError` for anything else."""
        meta, _ = unpack(_STATE, message)
        with reading(_STATE):
            exactly("the file", meta, ("conversations", "num_turns", "num_slots"))
            made = cls()
            for name, slot, tokens, num_pending in meta["conversations"]:
                said = token_ids(name, tokens, vocab_size=1 << 31)
                whole("num_pending", num_pending, most=len(said))
                made[name] = Conversation(whole("slot", slot), said, num_pending)
            made.num_turns = whole("num_turns", meta["num_turns"])
            made.num_slots = whole("num_slots", meta["num_slots"])
            return made


def check_name(name: Any) -> None:
    """``ValueError`` for what cannot name a conversation."""
    if type(name) not in (str, int):
        raise ValueError(f"a conversation is named by a str or an int, not {name!r}")
