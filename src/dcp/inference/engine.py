"""Conversations with a model over N ranks: prompts in, tokens out, the cache kept in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dcp.checks import whole
from dcp.cluster import Cluster
from dcp.errors import DCPError
from dcp.inference.attention import CachedAttention
from dcp.inference.books import Extent as Held
from dcp.inference.cache import KVCache
from dcp.inference.conversations import Conversations, Extent, Name, check_name
from dcp.inference.draws import Draws, Meeting, Part
from dcp.inference.inputs import Drawn, Sampling
from dcp.inference.model import last_logits, use_cached_attention
from dcp.inference.saved import load, save
from dcp.inference.turn import Selector
from dcp.integrations.model_checks import rotary_limit
from dcp.runtime.group import resolve_group


class InferenceEngine:
    """A causal language model that continues many conversations at once.

    Every rank makes one and calls the same methods with the same arguments; all get the same
    tokens. Keys and values are shared out over the ranks of ``group``. Weights are whole on each of
    them, or shared out over a ``tensor_group`` (:func:`dcp.inference.weights.share_weights`), whose
    ranks then also have KV heads of their own: a mesh of (ranks of attention) x (ranks of tensor
    parallelism), of which each rank gives its row and its column.

    Args:
        model: a Hugging Face model whose attention is causal (Llama and its like), on its device.
        num_ranks: all ranks in this process; None: this process is one rank of ``group``.
        group: a ``torch.distributed`` group or a mesh of one axis; None: the default one, or a
            single rank.
        tensor_group: the ranks that share the weights of ``model`` with this one; None: it is
            whole.
        num_pages, page_size, window_pages: of the cache, see :class:`dcp.inference.KVCache`.
        cluster: the rates that turns are planned by; default rates otherwise.
        strategy: of prompts, see :func:`dcp.inference.plan_turn`. Decoding passes queries.
        kernel: as :class:`dcp.AttentionExecutor` takes it.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_ranks: int | None = None,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        tensor_group: DeviceMesh | None = None,
        num_pages: int = 256,
        page_size: int = 256,
        window_pages: int | None = None,
        cluster: Cluster | None = None,
        strategy: str | Selector = "planned",
        kernel: str = "auto",
    ) -> None:
        if tensor_group is not None and group is None:
            raise ValueError("tensor_group needs group, too: the other axis of the ranks' mesh")
        self._group = resolve_group(group) if num_ranks is None else None
        self._tensor_group = None if tensor_group is None else tensor_group.get_group()
        shares = 1 if tensor_group is None else tensor_group.size()
        self._share = 0 if tensor_group is None else tensor_group.get_local_rank()
        size = dist.get_world_size(self._group) if self._group else num_ranks or 1
        ranks = [dist.get_rank(self._group)] if self._group else range(size)
        self.cluster = cluster or Cluster(devices_per_node=size)
        if self.cluster.num_ranks != size:
            raise ValueError(f"the cluster has {self.cluster.num_ranks} ranks, there are {size}")
        self.model, self.strategy = model, strategy
        self.spec, reach = use_cached_attention(model, tensor_parallel=shares)
        self.device = next(model.parameters()).device
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.rotary_limit = rotary_limit(model.config.get_text_config())
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
        self.attention = CachedAttention(caches, group=self._group, kernel=kernel)
        self._conversations = Conversations()
        self.step_seconds: list[float] = []  # of the last call: a prompt, then token by token
        groups = [group for group in (self._group, self._tensor_group) if group is not None]
        self._meeting = Meeting(groups, speaks=self._share == 0)

    # ------------------------------------------------------------------ talking

    def generate(
        self,
        prompts: Mapping[Any, Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        end: int | None = None,
    ) -> dict[Any, list[int]]:
        """Continue each named conversation by its prompt and then by the model's tokens.

        Args:
            prompts: tokens by name, a string or an integer; a name not known yet begins a
                conversation, a known one may have an empty prompt.
            temperature: of sampling; 0 takes the likeliest token.
            top_k, top_p: see :class:`dcp.inference.inputs.Sampling`.
            seed: a token drawn depends on it, on the conversation and on the position, not on the
                number of ranks.
            end: a token after which a conversation stops.

        Raises ``ValueError`` for an empty conversation, for what is no token of the model and, on
        all ranks alike, where the cache is full; ``DCPError`` where another rank failed. Then no
        trace is left of this call: conversations and cache are as they were before it.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        said = self._check(prompts, max_new_tokens, end)
        before, seconds = self._extent(), self.step_seconds
        try:
            return self._converse(said, max_new_tokens, sampling, end)
        except BaseException:
            self.step_seconds = seconds
            self._undo(before)
            raise
        finally:
            self._settle()

    def _converse(
        self, said: dict[Name, list[int]], max_new_tokens: int, sampling: Sampling, end: int | None
    ) -> dict[Any, list[int]]:
        for name, prompt in said.items():
            self.say(name, prompt)
        replies: dict[Name, list[int]] = {name: [] for name in said}
        live, self.step_seconds = list(said), []
        while live and len(self.step_seconds) < max_new_tokens:
            began = perf_counter()
            parts = [self._whole(name, sampling) for name in live]
            for name, drawn in zip(live, self._step(parts), strict=True):
                assert drawn is not None
                replies[name].append(drawn.token)
            live = [name for name in live if end is None or replies[name][-1] != end]
            self.step_seconds.append(perf_counter() - began)
        return replies

    def _whole(self, name: Name, sampling: Sampling) -> Part:
        """All that is pending of a conversation, and one token drawn after it."""
        of = self._conversations[name]
        shift, sampling = of.slot + self._conversations.num_turns, replace(sampling, stream=of.slot)
        return Part(name, of.num_pending, shift=shift, sampling=sampling)

    # ------------------------------------------------------------------ step by step

    def say(self, name: Name, tokens: Sequence[int]) -> None:
        """Add tokens to a conversation, or begin it; they are pending until a step takes them."""
        self._conversations.say(name, tokens)

    def num_pending(self, name: Name) -> int:
        """Tokens of a conversation that are not in the cache yet."""
        return self._conversations.known(name).num_pending

    def step(self, parts: Sequence[Part]) -> list[Drawn | None]:
        """One turn of some conversations together; what was drawn after each, which is said now.

        Raises what went wrong, on all ranks; then the step leaves no trace.
        """
        before = self._extent()
        try:
            return self._step(parts)
        except BaseException:
            self._undo(before)
            raise
        finally:
            self._settle()

    @property
    def names(self) -> list[Name]:
        """Conversations, in the order in which they began."""
        return list(self._conversations)

    @property
    def is_lost(self) -> bool:
        """Whether the ranks can no longer meet, so that nothing more can be asked."""
        return self._meeting.lost is not None

    def tokens(self, name: Name) -> list[int]:
        """All tokens of a conversation, prompts and replies. ``ValueError`` for an unknown one."""
        return list(self._conversations.known(name).tokens)

    def evict(self, name: Name) -> None:
        """Forget a conversation and free its pages. ``ValueError`` for an unknown one."""
        self._conversations.known(name)
        del self._conversations[name]
        for cache in self.attention.caches:
            if name in cache.sequences:
                cache.evict(name)

    def fork(
        self,
        name: Name,
        *,
        from_: Name,
        num_tokens: int | None = None,
        then: Sequence[int] = (),
    ) -> None:
        """Begin a conversation with the first tokens of another, which share its pages.

        What is said to either one later is unknown to the other. The next turn reads the last token
        again, so that it needs no prompt; and all of them where layers of windows or chunks have
        forgotten what fewer tokens than all would see (:meth:`dcp.inference.KVCache.keeps`).

        Args:
            name: of the new conversation.
            num_tokens: of ``from_``; all by default.
            then: tokens that are said next, as by :meth:`say`; with them, no token is read again.

        Raises ``ValueError`` for an unknown ``from_``, a known ``name``, and where pages do not
        suffice; then nothing is changed.
        """
        old = self._conversations.known(from_)
        check_name(name)
        if name in self._conversations:
            raise ValueError(f"there is a conversation {name!r} already: fork to a new name")
        count = len(old.tokens)
        if num_tokens is not None:
            count = whole("num_tokens", num_tokens, least=1, most=count)
        cached = min(count if then else count - 1, old.num_cached)
        if cached and self.attention.caches[0].keeps(from_, cached):
            for cache in self.attention.caches:
                cache.share(from_, name, num_tokens=cached)
        else:
            cached = 0
        self._conversations.say(name, [*old.tokens[:count], *then])
        self._conversations[name].num_pending -= cached

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[Name | None, int]:
        """The conversation that begins like ``tokens`` for longest, and how many tokens of it
        :meth:`fork` could share with a conversation that begins with them; ``(None, 0)`` if none.
        """
        cache = self.attention.caches[0]
        best: tuple[Name | None, int] = (None, 0)
        for name, old in self._conversations.items():
            pairs = zip(tokens, old.tokens[: old.num_cached], strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if common > best[1] and cache.keeps(name, common):
                best = name, common
        return best

    def _extent(self) -> tuple[Extent, list[Held]]:
        """How far conversations and caches are, for :meth:`_undo`."""
        caches = self.attention.caches
        return self._conversations.extent(), [cache.extent() for cache in caches]

    def _undo(self, before: tuple[Extent, list[Held]]) -> None:
        """Forget all that happened since :meth:`_extent`."""
        said, held = before
        self._conversations.undo(said)
        for cache, extent in zip(self.attention.caches, held, strict=True):
            cache.undo(extent)

    def _settle(self) -> None:
        """Nothing is undone any more."""
        for cache in self.attention.caches:
            cache.settle()

    def _forward(self, parts: Sequence[Part]) -> dict[int, Tensor]:
        """Bring tokens of these conversations into the cache; logits after the last of each."""
        names = [part.name for part in parts]
        of = [self._conversations[name] for name in names]
        new = [
            c.tokens[c.num_cached : c.num_cached + part.num_tokens]
            for c, part in zip(of, parts, strict=True)
        ]
        plans = self.attention.plans(
            names,
            [len(tokens) for tokens in new],
            self.cluster,
            strategy="pass_q" if all(len(tokens) == 1 for tokens in new) else self.strategy,
            shifts=[part.shift for part in parts],
        )
        self.attention.begin(plans, names)
        self._conversations.num_turns += 1
        for conversation, tokens in zip(of, new, strict=True):
            conversation.num_pending -= len(tokens)
        return last_logits(self.model, new, self.attention)

    def _step(self, parts: Sequence[Part]) -> list[Drawn | None]:
        """A token is drawn by the rank that has its logits.

        A rank that fails still meets the others here, so that no later message is taken for one of
        this turn.
        """
        rank, num_ranks = self.attention.caches[0].rank, self.cluster.num_ranks
        draws = Draws(parts, num_ranks=num_ranks, device=self.device)
        failed: Exception | None = None
        try:
            for index, logits in self._forward(parts).items():
                draws.draw(index, logits, len(self._conversations[parts[index].name].tokens))
        except Exception as error:
            failed = error
            draws.fail(rank)
        found = self._meeting.finish(draws, failed)
        for part, drawn in zip(parts, found, strict=True):
            if drawn is not None:
                self.say(part.name, [drawn.token])
        return found

    def _check(
        self, prompts: Mapping[Any, Sequence[int]], max_new_tokens: int, end: int | None
    ) -> dict[Name, list[int]]:
        """What is said to each conversation, after all of it has been checked."""
        if self.is_lost:
            raise DCPError(f"the ranks have lost each other, begin anew: {self._meeting.lost}")
        whole("max_new_tokens", max_new_tokens, least=1)
        if end is not None:
            whole("end", end)
        return self._conversations.checked(prompts, vocab_size=self.vocab_size)

    # ------------------------------------------------------------------ on disk

    def save(self, folder: str | Path) -> None:
        """Write all conversations and this process's part of the cache, for :meth:`load`."""
        save(folder, self._conversations, self.attention.caches, share=self._share)
        self._meeting.wait()

    def load(self, folder: str | Path) -> None:
        """Go on where :meth:`save` was called, on as many ranks; what was here is forgotten.

        Raises ``ValueError`` where the files are of another model, cache or number of ranks, are
        damaged, or do not belong together; then nothing is changed.
        """
        caches = self.attention.caches
        self._conversations, caches[:] = load(folder, caches, device=self.device, share=self._share)
