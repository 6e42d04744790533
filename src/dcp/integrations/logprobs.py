"""Log-probabilities of samples that arrive at run time, by a Hugging Face model (RL, preferences).

::

    planned = DCPModel(model)  # bare, with adapters, in DistributedDataParallel or sharded by FSDP2
    with torch.no_grad():
        old = planned.token_logprobs(samples)  # this rank's own
    logprobs = planned.token_logprobs(samples)
    loss = logprobs.zero + sum(objective(new, was) for new, was in zip(logprobs, old))
    loss.backward()

The samples of all ranks are one batch, planned on the group's first rank. Each rank computes its
share of the tokens, and every value goes home to the rank that brought its sample; gradients go the
way back. To the caller it is as if each rank had computed its own samples alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.cluster import Cluster
from dcp.data.exchange import Exchange
from dcp.data.pooled import PooledSamples, SampleReader, send_home
from dcp.data.preferences import SharedPromptMasks
from dcp.data.samples import IGNORED
from dcp.integrations.describe import FULL, SLIDING, Attention
from dcp.integrations.model_checks import inner_model, text_config
from dcp.integrations.transformers import NAME, attention_of, local_logits, register_attention
from dcp.planner import Planner
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor
from dcp.runtime.group import resolve_group

__all__ = ["DCPModel", "TokenLogprobs", "local_logprobs", "refuse_windows"]


class TokenLogprobs(list[Tensor]):
    """Log-probabilities of a rank's own samples: float32 ``[labels of it that count]`` each.

    Attributes:
        entropies: of the predictions, in nats, of the same shapes; None unless asked for.
        zero: a 0 of the same graph. A loss that includes it goes backward on a rank whose own
            samples have no part in it, too: all ranks must, for they compute for each other.
        plan: this rank's plan of the batch; its ``stats`` say how even and how far.
    """

    def __init__(self, values: Tensor, counts: Sequence[int], plan: RankPlan) -> None:
        columns = [values[:, n].split(list(counts)) for n in range(values.shape[1])]
        super().__init__(columns[0])
        self.entropies = list(columns[1]) if len(columns) > 1 else None
        self.zero, self.plan = values[:0].sum(), plan


class DCPModel:
    """A causal language model whose attention is planned anew for every list of samples.

    Constructing it is collective over the group, and gives the model ``attn_implementation="dcp"``;
    to generate with the same model, set another one meanwhile: each call sets its own again.

    Args:
        model: of transformers; bare, or wrapped by peft, DistributedDataParallel or FSDP2.
        group: the ranks that share attention; see :func:`dcp.runtime.group.resolve_group`.
        mask: name of a mask, or ``mask_fn(seqlens, samples)``, for every layer. None: what the
            model asks for, of samples with ``answer_lengths`` that of a shared prompt.
        dtype: of queries and keys, where autocast or FSDP2 computes in another than the model's.
        cluster: the machine, with one device per rank; by default one node.
        strategy, plan_options: of :func:`dcp.plan`, and its further keywords.
        timeout_seconds: how long a rank waits for another, before ``dcp.PlanningError``.

    Raises ``ValueError`` for a model that dcp cannot serve, and for wrong planning options.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        group: Any = None,
        mask: Any = None,
        dtype: str | torch.dtype | None = None,
        strategy: str = "auto",
        cluster: Cluster | None = None,
        plan_options: Mapping[str, Any] | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.model, self.mask, self.group = model, mask, resolve_group(group)
        register_attention()
        self._exchange = Exchange(group, None, timeout_seconds=timeout_seconds)
        with self._exchange.together():
            self.attention = attention_of(model, dtype=dtype)
            config = text_config(model)
            weights = self.attention.weights if mask is None else None
            self._reader = SampleReader(
                self._masks, weights, config.vocab_size, self._exchange.rank
            )
            own = cluster or Cluster(num_nodes=1, devices_per_node=self._exchange.num_ranks)
            self._planner = Planner(
                self.attention.spec,
                own,
                strategy=strategy,
                **{"model_width": config.hidden_size, **(plan_options or {})},
            )
        self._executor = AttentionExecutor(self.group, kernel=own.kernel)
        self._calls = 0
        self._timeout = timeout_seconds

    def token_logprobs(
        self, samples: Sequence[Any], *, temperature: float = 1.0, with_entropy: bool = False
    ) -> TokenLogprobs:
        """Log-probabilities of the labels of this rank's samples; collective.

        Args:
            samples: this rank's own, none or as many as it has. Token ids, or mappings as
                :class:`dcp.data.SampleFormat` reads them, with ``answer_lengths`` where several
                answers share a prompt (:func:`dcp.data.answers_to`). Other keys are the
                caller's. Labels lie beside their tokens: label i is predicted from the tokens
                before it. One that is -100, the first of a sample and the first of each answer of
                a shared prompt have none. So n token ids have n - 1 values, and a shared prompt
                one per token of its answers, answer after answer.
            temperature: logits are divided by it, for log-probabilities and entropies.
            with_entropy: also compute :attr:`TokenLogprobs.entropies`.

        Differentiable: over all ranks, the gradients of the parameters sum to those of the ranks'
        losses, as in data parallelism. Several calls may precede one backward; then each of them
        must have a part in it on every rank, by its values or its ``zero``.

        Raises ``ValueError`` on all ranks for a bad sample on any of them, with rank and sample,
        and where ranks ask for different things.
        """
        with self._exchange.together():
            asked = {"temperature": float(temperature), "entropy": bool(with_entropy)}
            if not asked["temperature"] > 0:
                raise ValueError(f"temperature must be positive, got {temperature}")
            own = self._reader.message(samples, asked | {"gradient": torch.is_grad_enabled()})
        pool = PooledSamples.of(self._exchange.gather(own))
        plan = self._plan(pool)
        mine = plan.token_indices
        tokens, labels, positions = (self._tensor(each) for each in pool.columns[:, mine])
        model: Any = inner_model(self.model)
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        values = local_logprobs(
            self.model, tokens, positions, labels, self._executor.bind(plan),
            temperature=temperature, with_entropy=with_entropy,
            **(self.attention.keywords if self.mask is None else {"dcp_any_mask": True}),
        )  # fmt: skip
        computed = mine[pool.labels[mine] != IGNORED]
        home = send_home(values, computed, pool, self._exchange, self.group)
        return TokenLogprobs(home, pool.num_labels(self._exchange.rank), plan)

    def _masks(self, length: int, sample: Mapping[str, Any]) -> Any:
        """What :class:`SequenceBatch` takes as the masks of one sample."""
        if self.mask is not None:
            return self.mask([length], [sample]) if callable(self.mask) else self.mask
        if sample.get("answer_lengths") is None:
            return self.attention.masks
        refuse_windows(self.attention)
        return {FULL: SharedPromptMasks()([length], [sample])}

    def _plan(self, pool: PooledSamples) -> RankPlan:
        """This rank's plan, made on the first rank; collective."""
        exchange, messages = self._exchange, []
        self._calls += 1
        with exchange.together():
            if exchange.rank == 0:
                if self._calls > 1:  # all have its plan, or they would not be here
                    exchange.was_read(str(self._calls - 1), wait_seconds=self._timeout)
                plan = self._planner.plan(pool.batch(self._reader.weights))
                messages = [plan.rank_plan(rank).to_bytes() for rank in range(plan.num_ranks)]
                exchange.publish(str(self._calls), messages)
        own = messages[0] if messages else exchange.fetch(str(self._calls), 0)
        return RankPlan.from_bytes(own)

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(next(self.model.parameters()).device)


def refuse_windows(attention: Attention) -> None:
    """Raise ``ValueError`` for a model whose layers cannot see shared prompts as it asks."""
    if SLIDING in attention.masks:
        raise ValueError(
            f"answers that share a prompt do not go with windows ({attention.masks[SLIDING]}), "
            "which would have to follow each answer back into the prompt: give each answer as a "
            "sample of its own, behind its prompt"
        )


def local_logprobs(
    model: torch.nn.Module,
    tokens: Tensor,
    positions: Tensor,
    labels: Tensor,
    executor: AttentionExecutor | Any,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    **others: Any,
) -> Tensor:
    """Log-probabilities of this rank's labels that count, in the order of tokens.

    Logits are computed for those rows alone, where the model takes ``logits_to_keep``.

    Args:
        tokens, positions, labels: int64 ``[local]``, as :class:`dcp.data.LocalBatch` has them.
        others: see :func:`dcp.integrations.transformers.local_logits`, which raises the same.

    Returns float32 ``[rows, 1]``, with entropies ``[rows, 2]``.
    """
    rows = (labels != IGNORED).nonzero()[:, 0]
    keeps = "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters
    if keeps:
        others["logits_to_keep"] = rows
    logits = local_logits(model, tokens, positions, executor, use_cache=False, **others)
    logits = logits if keeps else logits[rows]
    every = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = every.gather(1, labels[rows, None])
    if not with_entropy:
        return chosen
    return torch.cat([chosen, -(every.exp() * every).sum(dim=-1, keepdim=True)], dim=1)
