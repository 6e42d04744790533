"""Conversations with a model over N ranks: prompts in, tokens out, the cache kept in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcp.checks import whole
from dcp.cluster import Cluster
from dcp.errors import DCPError
from dcp.inference.attention import CachedAttention
from dcp.inference.books import Extent
from dcp.inference.cache import KVCache
from dcp.inference.inputs import Sampling, token_ids
from dcp.inference.model import last_logits, use_cached_attention
from dcp.inference.turn import Selector
from dcp.wire import exactly, pack, reading, unpack

Name = str | int
CONVERSATIONS, _STATE = "conversations.dcp", "conversations"
# tokens and pending ones of each conversation, extents of the caches, turns, slots
_State = tuple[dict[Name, tuple[int, int]], list[Extent], int, int]


@dataclass
class _Conversation:
    """All tokens so far, and how many of them, the last ones, are not in the cache yet."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    num_pending: int = 0


class InferenceEngine:
    """A causal language model that continues many conversations at once.

    Every rank makes one and calls the same methods with the same arguments; all get the same
    tokens. Weights are whole on each rank; keys and values are shared out.

    Args:
        model: a Hugging Face model whose attention is causal (Llama and its like), on its device.
        num_ranks: all ranks in this process; None: this process is one rank of ``group``.
        group: a ``torch.distributed`` group; None: the default one, or a single rank.
        num_pages, page_size, window_pages: of the cache, see :class:`dcp.inference.KVCache`.
        cluster: the rates that turns are planned by; default rates otherwise.
        strategy: of prompts, see :func:`dcp.inference.plan_turn`. Decoding passes queries.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_ranks: int | None = None,
        group: dist.ProcessGroup | None = None,
        num_pages: int = 256,
        page_size: int = 256,
        window_pages: int | None = None,
        cluster: Cluster | None = None,
        strategy: str | Selector = "planned",
    ) -> None:
        is_group = num_ranks is None and dist.is_available() and dist.is_initialized()
        self._group = (group or dist.group.WORLD) if is_group else None
        size = dist.get_world_size(self._group) if is_group else num_ranks or 1
        ranks = [dist.get_rank(self._group)] if is_group else range(size)
        self.cluster = cluster or Cluster(devices_per_node=size)
        if self.cluster.num_ranks != size:
            raise ValueError(f"the cluster has {self.cluster.num_ranks} ranks, there are {size}")
        self.model, self.strategy = model, strategy
        self.spec, reach = use_cached_attention(model)
        self.device = next(model.parameters()).device
        caches = [
            KVCache(
                self.spec,
                num_layers=len(reach),
                reach=reach,
                num_pages=num_pages,
                window_pages=window_pages,
                page_size=page_size,
                rank=rank,
                num_ranks=size,
                device=self.device,
            )
            for rank in ranks
        ]
        self.attention = CachedAttention(caches, group=self._group)
        self._conversations: dict[Name, _Conversation] = {}
        self.step_seconds: list[float] = []  # of the last call: a prompt, then token by token
        self._num_turns = 0
        self._num_slots = 0
        self._lost: str | None = None  # why the ranks can no longer meet

    # ------------------------------------------------------------------ talking

    def generate(
        self,
        prompts: Mapping[Any, Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        end: int | None = None,
    ) -> dict[Any, list[int]]:
        """Continue each named conversation by its prompt and then by the model's tokens.

        Args:
            prompts: tokens by name, a string or an integer; a name not known yet begins a
                conversation, a known one may have an empty prompt.
            temperature: of sampling; 0 takes the likeliest token.
            top_k: sample from the likeliest ones only.
            seed: a token drawn depends on it, on the conversation and on the position, not on the
                number of ranks.
            end: a token after which a conversation stops.

        Raises ``ValueError`` for an empty conversation, for what is no token of the model and, on
        all ranks alike, where the cache is full; ``DCPError`` where another rank failed. Then no
        trace is left of this call: conversations and cache are as they were before it.
        """
        sampling = Sampling(temperature, top_k, seed)
        said = self._check(prompts, max_new_tokens, end)
        before, seconds = self._state(), self.step_seconds
        try:
            return self._converse(said, max_new_tokens, sampling, end)
        except BaseException:
            self.step_seconds = seconds
            self._go_back(before)
            raise

    def _converse(
        self, said: dict[Name, list[int]], max_new_tokens: int, sampling: Sampling, end: int | None
    ) -> dict[Any, list[int]]:
        for name, prompt in said.items():
            self._say(name, prompt)
        replies: dict[Name, list[int]] = {name: [] for name in said}
        live, self.step_seconds = list(said), []
        while live and len(self.step_seconds) < max_new_tokens:
            began = perf_counter()
            strategy = "pass_q" if self.step_seconds else self.strategy
            for name, token in zip(live, self._next(live, strategy, sampling), strict=True):
                self._say(name, [token])
                replies[name].append(token)
            live = [name for name in live if end is None or replies[name][-1] != end]
            self.step_seconds.append(perf_counter() - began)
        return replies

    def tokens(self, name: Name) -> list[int]:
        """All tokens of a conversation, prompts and replies. ``ValueError`` for an unknown one."""
        self._known(name)
        return list(self._conversations[name].tokens)

    def evict(self, name: Name) -> None:
        """Forget a conversation and free its pages. ``ValueError`` for an unknown one."""
        self._known(name)
        del self._conversations[name]
        for cache in self.attention.caches:
            if name in cache.sequences:
                cache.evict(name)

    def fork(self, name: Name, *, from_: Name, num_tokens: int | None = None) -> None:
        """Begin a conversation with the first tokens of another, which share its pages.

        What is said to either one later is unknown to the other. The next turn reads the last token
        again, so that it needs no prompt; and all of them where layers of windows or chunks have
        forgotten what fewer tokens than all would see (:meth:`dcp.inference.KVCache.keeps`).

        Args:
            name: of the new conversation.
            num_tokens: of ``from_``; all by default.

        Raises ``ValueError`` for an unknown ``from_``, a known ``name``, and where pages do not
        suffice; then nothing is changed.
        """
        self._known(from_)
        self._check_name(name)
        if name in self._conversations:
            raise ValueError(f"there is a conversation {name!r} already: fork to a new name")
        old = self._conversations[from_]
        count = len(old.tokens)
        if num_tokens is not None:
            count = whole("num_tokens", num_tokens, least=1, most=count)
        cached = min(count - 1, len(old.tokens) - old.num_pending)
        if cached and self.attention.caches[0].keeps(from_, cached):
            for cache in self.attention.caches:
                cache.share(from_, name, num_tokens=cached)
        else:
            cached = 0
        self._conversations[name] = _Conversation(
            self._num_slots, old.tokens[:count], count - cached
        )
        self._num_slots += 1

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[Name | None, int]:
        """The conversation that begins like ``tokens`` for longest, and how many tokens of it
        :meth:`fork` could share with a conversation that begins with them; ``(None, 0)`` if none.
        """
        cache = self.attention.caches[0]
        best: tuple[Name | None, int] = (None, 0)
        for name, old in self._conversations.items():
            pairs = zip(tokens, old.tokens[: len(old.tokens) - old.num_pending], strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if common > best[1] and cache.keeps(name, common):
                best = name, common
        return best

    def _known(self, name: Name) -> None:
        if name not in self._conversations:
            raise ValueError(f"there is no conversation {name!r}")

    def _state(self) -> _State:
        kept = {name: (len(c.tokens), c.num_pending) for name, c in self._conversations.items()}
        extents = [cache.extent() for cache in self.attention.caches]
        return kept, extents, self._num_turns, self._num_slots

    def _go_back(self, before: _State) -> None:
        """Forget all that happened since :meth:`_state`."""
        kept, extents, self._num_turns, self._num_slots = before
        for name in set(self._conversations) - set(kept):
            del self._conversations[name]
        for name, (count, pending) in kept.items():
            conversation = self._conversations[name]
            del conversation.tokens[count:]
            conversation.num_pending = pending
        for cache, extent in zip(self.attention.caches, extents, strict=True):
            cache.undo(extent)

    def _say(self, name: Name, tokens: Sequence[int]) -> None:
        if name not in self._conversations:
            self._conversations[name] = _Conversation(self._num_slots)
            self._num_slots += 1
        conversation = self._conversations[name]
        conversation.tokens += tokens
        conversation.num_pending += len(tokens)

    def _forward(self, names: list[Name], strategy: str | Selector) -> dict[int, Tensor]:
        """Bring what is pending of these conversations into the cache; logits after it."""
        of = [self._conversations[name] for name in names]
        new = [c.tokens[len(c.tokens) - c.num_pending :] for c in of]
        plans = self.attention.plans(
            names,
            [len(tokens) for tokens in new],
            self.cluster,
            strategy=strategy,
            shifts=[c.slot + self._num_turns for c in of],
        )
        self.attention.begin(plans, names)
        self._num_turns += 1
        for conversation in of:
            conversation.num_pending = 0
        return last_logits(self.model, new, self.attention)

    def _next(self, names: list[Name], strategy: str | Selector, sampling: Sampling) -> list[int]:
        """The next token of each conversation, drawn by the rank that has its logits.

        A rank that fails still meets the others here, so that no later message is taken for one of
        this turn.
        """
        caches, count = self.attention.caches, len(names)
        drawn = torch.zeros(count + caches[0].num_ranks, dtype=torch.int64, device=self.device)
        failed: Exception | None = None
        try:
            for index, logits in self._forward(names, strategy).items():
                after = self._conversations[names[index]]
                drawn[index] = sampling.draw(logits, after.slot, len(after.tokens))
        except Exception as error:
            failed = error
            drawn[count + caches[0].rank] = 1
        if self._group is not None:
            self._meet(drawn, failed)
        if failed is not None:
            raise failed
        if ranks := drawn[count:].nonzero().flatten().tolist():
            raise DCPError(f"rank {ranks[0]} failed in this turn, of which nothing is kept")
        return drawn[:count].tolist()

    def _meet(self, drawn: Tensor, failed: Exception | None) -> None:
        """Sum over the ranks. Where that fails, the group is of no more use."""
        if self._lost is None:
            try:
                dist.all_reduce(drawn, group=self._group)
                return
            except RuntimeError as error:
                self._lost = str(error).strip().splitlines()[0]
        raise failed or DCPError(f"the ranks have lost each other: {self._lost}")

    def _check(
        self, prompts: Mapping[Any, Sequence[int]], max_new_tokens: int, end: int | None
    ) -> dict[Name, list[int]]:
        """What is said to each conversation, after all of it has been checked."""
        if self._lost is not None:
            raise DCPError(f"the ranks have lost each other, begin anew: {self._lost}")
        whole("max_new_tokens", max_new_tokens, least=1)
        if end is not None:
            whole("end", end)
        if not isinstance(prompts, Mapping):
            raise ValueError(f"prompts must map names to tokens, got a {type(prompts).__name__}")
        vocab_size = self.model.get_input_embeddings().num_embeddings
        said = {}
        for name, prompt in prompts.items():
            self._check_name(name)
            said[name] = token_ids(name, prompt, vocab_size=vocab_size)
            if not said[name] and name not in self._conversations:
                raise ValueError(f"conversation {name!r} is new and its prompt is empty")
        return said

    @staticmethod
    def _check_name(name: Any) -> None:
        if type(name) not in (str, int):
            raise ValueError(f"a conversation is named by a str or an int, not {name!r}")

    # ------------------------------------------------------------------ on disk

    def save(self, folder: str | Path) -> None:
        """Write all conversations and this process's part of the cache, for :meth:`load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "conversations": [
                [name, c.slot, c.tokens, c.num_pending] for name, c in self._conversations.items()
            ],
            "num_turns": self._num_turns,
            "num_slots": self._num_slots,
        }
        message = pack(_STATE, state, {})
        for cache in self.attention.caches:
            cache.note = sha256(message).hexdigest()
            cache.save(folder / f"rank-{cache.rank}.kv")
        if self.attention.caches[0].rank == 0:
            (folder / CONVERSATIONS).write_bytes(message)
        if self._group is not None:
            dist.barrier(group=self._group)

    def load(self, folder: str | Path) -> None:
        """Go on where :meth:`save` was called, on as many ranks; what was here is forgotten.

        Raises ``ValueError`` where the files are of another model, cache or number of ranks, are
        damaged, or do not belong together; then nothing is changed.
        """
        folder, here = Path(folder), self.attention.caches
        there = []
        for old in here:
            path = folder / f"rank-{old.rank}.kv"
            new = KVCache.load(path, device=self.device)
            if old.shape != new.shape:
                raise ValueError(f"{folder} holds a cache of {new.shape}, here it is {old.shape}")
            there.append((path, new))
        message = (folder / CONVERSATIONS).read_bytes()
        conversations, num_turns, num_slots = _read_state(message)
        for path, cache in there:
            held = cache.held(list(conversations)).sum(axis=1).tolist()
            wanted = [len(c.tokens) - c.num_pending for c in conversations.values()]
            if cache.note != sha256(message).hexdigest() or held != wanted:
                raise ValueError(f"{path} was not saved together with {folder / CONVERSATIONS}")
        self.attention.caches[:] = [cache for _, cache in there]
        self._conversations, self._num_turns, self._num_slots = conversations, num_turns, num_slots


def _read_state(message: bytes) -> tuple[dict[Name, _Conversation], int, int]:
    """Conversations, turns and slots; :class:`dcp.wire.WireError` for anything else."""
    meta, _ = unpack(_STATE, message)
    with reading(_STATE):
        exactly("the file", meta, ("conversations", "num_turns", "num_slots"))
        made = {}
        for name, slot, tokens, num_pending in meta["conversations"]:
            conversation = _Conversation(
                slot, token_ids(name, tokens, vocab_size=1 << 31), num_pending
            )
            made[name] = conversation
            if not 0 <= whole("num_pending", num_pending) <= len(tokens):
                raise ValueError(f"conversation {name!r} has {num_pending} tokens to come")
            whole("slot", slot)
        turns, slots = (whole(name, meta[name]) for name in ("num_turns", "num_slots"))
        return made, turns, slots
