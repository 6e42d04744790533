"""Conversations and caches in a folder: files that belong together, or are refused."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch

from dcp.inference.cache import KVCache
from dcp.inference.conversations import Conversations

CONVERSATIONS = "conversations.dcp"


def save(
    folder: str | Path, conversations: Conversations, caches: Sequence[KVCache], *, share: int = 0
) -> None:
    """Write the caches of this process and, on the first rank, the conversations.

    ``share``: which of the ranks that share weights this is.
    """
    folder, message = Path(folder), conversations.pack()
    folder.mkdir(parents=True, exist_ok=True)
    for cache in caches:
        cache.note = sha256(message).hexdigest()
        cache.save(folder / _name(cache, share))
    if caches[0].rank == share == 0:
        (folder / CONVERSATIONS).write_bytes(message)


def load(
    folder: str | Path, caches: Sequence[KVCache], *, device: torch.device | str, share: int = 0
) -> tuple[Conversations, list[KVCache]]:
    """What :func:`save` wrote, for the ranks of ``caches``.

    Raises ``ValueError`` where a cache is of another shape, and for files that are damaged or do
    not belong together.
    """
    folder, there = Path(folder), []
    for old in caches:
        path = folder / _name(old, share)
        new = KVCache.load(path, device=device)
        if old.shape != new.shape:
            raise ValueError(f"{folder} holds a cache of {new.shape}, here it is {old.shape}")
        there.append((path, new))
    message = (folder / CONVERSATIONS).read_bytes()
    conversations = Conversations.unpack(message)
    for path, cache in there:
        held = cache.held(list(conversations)).sum(axis=1).tolist()
        wanted = [c.num_cached for c in conversations.values()]
        if cache.note != sha256(message).hexdigest() or held != wanted:
            raise ValueError(f"{path} was not saved together with {folder / CONVERSATIONS}")
    return conversations, [cache for _, cache in there]


def _name(cache: KVCache, share: int) -> str:
    """The file of a cache."""
    return f"rank-{cache.rank}-{share}.kv" if share else f"rank-{cache.rank}.kv"
