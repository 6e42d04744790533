"""Conversations with a model over N ranks: prompts in, tokens out, the cache kept in between."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dcp.cluster import Cluster
from dcp.inference.attention import CachedAttention
from dcp.inference.cache import KVCache
from dcp.inference.model import last_logits, use_cached_attention
from dcp.inference.turn import Selector, plan_turn

Name = str | int


@dataclass
class _Conversation:
    """All tokens so far, and how many of them, the last ones, are not in the cache yet."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    num_pending: int = 0


@dataclass(frozen=True)
class _Sampling:
    """How a token is drawn from logits, see :meth:`InferenceEngine.generate`."""

    temperature: float
    top_k: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")

    def draw(self, logits: Tensor, after: _Conversation) -> int:
        """The next token of a conversation."""
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.double().cpu().numpy() / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        total = np.cumsum(np.exp(scores - scores.max()))
        random = np.random.default_rng([self.seed, after.slot, len(after.tokens)])
        return int(np.searchsorted(total, random.random() * total[-1], side="right"))


class InferenceEngine:
    """A causal language model that continues many conversations at once.

    Every rank makes one and calls the same methods with the same arguments; all get the same
    tokens. Weights are whole on each rank; keys and values are shared out.

    Args:
        model: a Hugging Face model whose attention is causal (Llama and its like), on its device.
        num_ranks: all ranks in this process; None: this process is one rank of ``group``.
        group: a ``torch.distributed`` group; None: the default one, or a single rank.
        num_pages, page_size: of the cache, see :class:`dcp.inference.KVCache`.
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
        self.spec = use_cached_attention(model)
        self.device = next(model.parameters()).device
        caches = [
            KVCache(
                self.spec,
                num_layers=model.config.num_hidden_layers,
                num_pages=num_pages,
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

        Raises ``ValueError`` for an empty conversation and, on all ranks alike, where the cache is
        full: then the conversations are as far as they came (:meth:`tokens`).
        """
        sampling = _Sampling(temperature, top_k, seed)
        self._check(prompts, max_new_tokens)
        for name, prompt in prompts.items():
            self._say(name, prompt)
        replies: dict[Name, list[int]] = {name: [] for name in prompts}
        live, self.step_seconds = list(prompts), []
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
        """All tokens of a conversation, prompts and replies."""
        return list(self._conversations[name].tokens)

    def evict(self, name: Name) -> None:
        """Forget a conversation and free its pages. ``ValueError`` for an unknown one."""
        if name not in self._conversations:
            raise ValueError(f"there is no conversation {name!r}")
        del self._conversations[name]
        for cache in self.attention.caches:
            if name in cache.sequences:
                cache.evict(name)

    def _say(self, name: Name, tokens: Sequence[int]) -> None:
        if name not in self._conversations:
            self._conversations[name] = _Conversation(self._num_slots)
            self._num_slots += 1
        conversation = self._conversations[name]
        conversation.tokens += [int(token) for token in tokens]
        conversation.num_pending += len(tokens)

    def _forward(self, names: list[Name], strategy: str | Selector) -> dict[int, Tensor]:
        """Bring what is pending of these conversations into the cache; logits after it."""
        of = [self._conversations[name] for name in names]
        new = [c.tokens[len(c.tokens) - c.num_pending :] for c in of]
        plan = plan_turn(
            [len(tokens) for tokens in new],
            self.attention.caches[0].held(names),
            self.spec,
            self.cluster,
            strategy=strategy,
            shifts=[c.slot + self._num_turns for c in of],
        )
        self.attention.begin(plan, names)
        self._num_turns += 1
        for conversation in of:
            conversation.num_pending = 0
        return last_logits(self.model, new, self.attention)

    def _next(self, names: list[Name], strategy: str | Selector, sampling: _Sampling) -> list[int]:
        """The next token of each conversation, drawn by the rank that has its logits."""
        tokens = torch.zeros(len(names), dtype=torch.int64, device=self.device)
        for index, logits in self._forward(names, strategy).items():
            tokens[index] = sampling.draw(logits, self._conversations[names[index]])
        if self._group is not None:
            dist.all_reduce(tokens, group=self._group)
        return tokens.tolist()

    def _check(self, prompts: Mapping[Any, Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        for name, prompt in prompts.items():
            if not isinstance(name, str | int):
                raise ValueError(f"a conversation is named by a str or an int, not {name!r}")
            if not len(prompt) and name not in self._conversations:
                raise ValueError(f"conversation {name!r} is new and its prompt is empty")

    # ------------------------------------------------------------------ on disk

    def save(self, folder: str | Path) -> None:
        """Write all conversations and this process's part of the cache, for :meth:`load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for cache in self.attention.caches:
            cache.save(folder / f"rank-{cache.rank}.kv")
        if self.attention.caches[0].rank == 0:
            state = {
                "conversations": [
                    [name, c.slot, c.tokens, c.num_pending]
                    for name, c in self._conversations.items()
                ],
                "num_turns": self._num_turns,
                "num_slots": self._num_slots,
            }
            (folder / "conversations.json").write_text(json.dumps(state))
        if self._group is not None:
            dist.barrier(group=self._group)

    def load(self, folder: str | Path) -> None:
        """Go on where :meth:`save` was called, on as many ranks; what was here is forgotten.

        Raises ``ValueError`` where the files are of another model, cache or number of ranks.
        """
        folder = Path(folder)
        here = self.attention.caches
        there = [KVCache.load(folder / f"rank-{c.rank}.kv", device=self.device) for c in here]
        for old, new in zip(here, there, strict=True):
            if old.shape != new.shape:
                raise ValueError(f"{folder} holds a cache of {new.shape}, here it is {old.shape}")
        state = json.loads((folder / "conversations.json").read_text())
        self.attention.caches[:] = there
        self._conversations = {name: _Conversation(*rest) for name, *rest in state["conversations"]}
        self._num_turns, self._num_slots = state["num_turns"], state["num_slots"]
