"""Hugging Face models with dcp attention, through the library's own attention registry.

::

    register_attention()
    model = LlamaForCausalLM(LlamaConfig(…, attn_implementation="dcp", use_cache=False))
    asked = attention_of(model)
    batch = SequenceBatch(seqlens, asked.masks, weights=asked.weights)
    executor.prepare(plan(batch, asked.spec, cluster))
    logits = local_logits(model, tokens, positions, executor, **asked.keywords)

The model sees one row of this rank's tokens, in the plan's order. Every rank must call it, one
without tokens too, because it computes for the others. Which tokens see which is the plan's
business, and must be what the model asks for; whatever else it asks of attention raises
``ValueError``, and so does a model whose tokens meet outside attention.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface

from dcp.integrations.describe import Attention, attention_of
from dcp.integrations.model_checks import (
    OWN_TABLES,
    check_calls,
    check_logits,
    check_model,
    frequencies_for,
    rotary_limit,
    try_model,
)
from dcp.integrations.model_masks import Asked, Band, asked_of, check_mask, register_masks
from dcp.plans import Plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor
from dcp.runtime.group import resolve_group

__all__ = [
    "Attention",
    "attention_of",
    "balance_loss",
    "dcp_attention",
    "local_logits",
    "local_output",
    "planned_forward",
    "register_attention",
]
NAME = "dcp"
_REFUSED = {  # what a model may ask for and a plan cannot give, and what to do
    "attention_mask": "masks belong to the plan",
    "dropout": "set attention dropout to 0",
    "position_bias": "use a model without a position bias",
    "head_mask": "use a model without a head mask",
    "attention_bias": "use a model without biases of scores",
    "sinks": "use a model without these sinks",
    "indices": "use a model without sparse selection of keys",
    "block_indices": "use a model without sparse selection of keys",
    "cu_seq_lens_q": "use a model without packed images; the plan knows the documents",
}


def register_attention() -> None:
    """Make ``attn_implementation="dcp"`` known to transformers."""
    AttentionInterface.register(NAME, dcp_attention)
    register_masks(NAME)
    for model, table in OWN_TABLES.items():
        module = import_module(f"transformers.models.{model}.modeling_{model}")
        getattr(module, table, {})[NAME] = _Unserved


class _Unserved(torch.nn.Module):
    """Takes the place of an attention layer in models that know a fixed list of implementations."""

    def __init__(self, config: Any, *_: Any) -> None:
        kind = type(config).__name__.removesuffix("Config")
        raise ValueError(
            f"{kind} models do not use the attention registry of transformers: they cannot be used "
            'with attn_implementation="dcp"'
        )


def local_logits(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    executor: AttentionExecutor | Any,
    **others: Any,
) -> torch.Tensor:
    """Logits ``[local, vocab]`` of this rank's tokens.

    A rank without tokens feeds the model one stand-in, for the models' own reshapes need a token;
    attention takes no part of it and its logits are left out.

    Args:
        tokens, positions: int64 ``[local]``, as :class:`dcp.data.LocalBatch` has them.
        others: further keywords of the model, such as ``dcp_sliding_mask``.

    Raises ``ValueError`` as :func:`planned_forward` does, and for a model without logits per token.
    """
    local = len(tokens)
    output = local_output(model, tokens, positions, executor, **others)
    rows = None if "logits_to_keep" in others else max(local, 1)
    return check_logits(model, output, rows)[:local]


def local_output(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    executor: AttentionExecutor | Any,
    **others: Any,
) -> Any:
    """All that the model returns for this rank's tokens, see :func:`local_logits`; on a rank
    without tokens it is that of one stand-in."""
    if len(tokens) == 0:
        tokens, positions = tokens.new_zeros(1), positions.new_zeros(1)
        others["dcp_stand_ins"] = 1
    with planned_forward(model, executor) as keywords:
        return model(input_ids=tokens[None], position_ids=positions[None], **keywords, **others)


@contextmanager
def planned_forward(
    model: torch.nn.Module, executor: AttentionExecutor | Any
) -> Iterator[dict[str, Any]]:
    """For one call of ``model``: the keywords that it needs, and the checks around it.

    Rotary frequencies that depend on the longest sequence are those of the plan's longest one.

    Raises ``ValueError`` for a model that mixes tokens outside attention or counts rows
    (:func:`~dcp.integrations.model_checks.try_model` runs it on a few tokens the first time), and
    afterwards if not every attention layer came to dcp once.
    """
    check_model(model)
    try_model(model)
    calls: deque[str] = deque()  # see check_calls
    longest = executor.plan.longest if executor.plan else 0
    with frequencies_for(model, longest):
        yield {"dcp_executor": executor, "dcp_calls": calls}
    check_calls(model, calls)


def dcp_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Asked | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    dcp_executor: AttentionExecutor | Any = None,
    dcp_mask: str | None = None,
    dcp_sliding_mask: str | None = None,
    dcp_any_mask: bool = False,
    dcp_calls: deque[str] | None = None,
    dcp_stand_ins: int = 0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of this rank's tokens over the whole batch, as transformers calls it.

    Args:
        query, key, value: ``[1, heads, local, head_dim]``, rotary embedding applied.
        dcp_executor: a prepared executor, given to the model as a keyword; or what else has its
            ``attention`` and ``plan``.
        dcp_mask: name of the plan's mask, where it has several.
        dcp_sliding_mask: name of the plan's mask for the layers with a sliding window; without it
            such layers raise, for the plan would not know of their window.
        dcp_any_mask: the plan's mask is meant, whatever the model asks for. Without it, a layer
            that asks for causal attention or a window must not see more, and a bidirectional one
            needs a plan that shows later tokens.
        dcp_stand_ins: last rows of ``local`` that are no tokens: attention leaves them out, their
            output is 0.
        dcp_calls: where each call leaves its layer's class, see :func:`planned_forward`.
        softcap: cap of the scores (Gemma 2).
        s_aux: attention sinks ``[heads]`` (gpt-oss).

    Returns ``[1, local, heads, head_dim]`` and no weights.
    """
    if dcp_executor is None:
        raise ValueError(
            'attention "dcp" needs the model called with dcp_executor=executor, and a model that '
            f"passes keywords on to its attention: {type(module).__name__} got none"
        )
    _check_shapes(query, key)
    asked = attention_mask if isinstance(attention_mask, Asked) else None
    _refuse(attention_mask=None if asked else attention_mask, dropout=dropout or None, **others)
    asked = asked_of(module, asked, sliding_window, is_causal)
    mask, plan = dcp_mask, dcp_executor.plan
    if plan:
        if dcp_calls is None:
            _check_rotary(module, plan.longest)
        if sliding_window is not None:
            mask = _sliding_mask(sliding_window, dcp_sliding_mask)
        elif dcp_sliding_mask and asked.is_window(plan.longest):
            mask = dcp_sliding_mask  # a window that only the mask function knows
        if not dcp_any_mask:
            _check_plan(module, asked, plan, mask, windowed=sliding_window is not None)
    if dcp_calls is not None:
        dcp_calls.append(type(module).__name__)
    # Under autocast the rotary embedding leaves queries and keys in fp32.
    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    if dcp_stand_ins:
        q, k, v = (t[:-dcp_stand_ins] for t in (q, k, v))
    out = dcp_executor.attention(
        q.contiguous(), (k, v), mask=mask, scale=scaling, sink=s_aux, softcap=softcap
    )
    if dcp_stand_ins:  # attention stays in the graph: its backward works for other ranks
        out = torch.cat([out, out.new_zeros(dcp_stand_ins, *out.shape[1:])])
    return out[None], None


def balance_loss(
    router_logits: Sequence[torch.Tensor],
    *,
    num_experts_per_token: int,
    num_local_tokens: int,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """This rank's part of the load balancing loss of the whole batch; the parts of all ranks of
    the group sum to it, and so do their gradients.

    A model's own balance loss is that of the rank's tokens, and the mean of those is not that of
    the batch: the loss is a product of two averages over tokens (Switch Transformers, arXiv
    2101.03961, equations 4 to 6). Here the counts of routed tokens are summed over the ranks.

    Args:
        router_logits: ``[rows, experts]`` of each layer, as models return them with
            ``output_router_logits=True`` (see :func:`local_output`).
        num_experts_per_token: experts that a token is sent to.
        num_local_tokens: of this rank; rows behind them are stand-ins.
        group: the ranks that share the batch; None: the default group, if there is one.
    """
    logits = torch.cat([of_layer[:num_local_tokens].float() for of_layer in router_logits])
    weights = logits.softmax(dim=-1)
    chosen = weights.topk(num_experts_per_token, dim=-1).indices
    num_experts = logits.shape[-1]
    routed = torch.bincount(chosen.flatten(), minlength=num_experts)
    counts = torch.cat([routed, routed.new_tensor([len(logits)])]).double()
    group = resolve_group(group)
    if group is not None:
        dist.all_reduce(counts, group=group)
    rows = counts[-1].clamp(min=1)
    share = (counts[:-1] / rows).to(weights.dtype)
    return num_experts * (share * weights.sum(dim=0) / rows.to(weights.dtype)).sum()


def _check_shapes(query: torch.Tensor, key: torch.Tensor) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"dcp attention takes one row of local tokens, got {query.shape[0]} rows")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{query.shape[2]} queries for {key.shape[2]} keys: set use_cache=False")


def _check_plan(
    module: torch.nn.Module,
    asked: Asked,
    plan: Plan | RankPlan,
    name: str | None,
    *,
    windowed: bool,
) -> None:
    """Raise ``ValueError`` unless the plan's mask is what the layer asks for."""
    name = next(iter(plan.masks)) if name is None else name
    if (tables := plan.masks.get(name)) is not None:  # the executor refuses unknown names
        held = Band(tables.first_key, tables.last_key, tables.is_band)
        check_mask(module, asked, held, longest=plan.longest, name=name, windowed=windowed)


def _check_rotary(module: torch.nn.Module, longest: int) -> None:
    limit = rotary_limit(getattr(module, "config", None))
    if limit is not None and longest > limit:
        raise ValueError(
            f"rotary frequencies of {type(module).__name__} depend on the longest sequence beyond "
            f"{limit} tokens, here {longest}: call the model through local_logits"
        )


def _refuse(**asked: Any) -> None:
    for name, remedy in _REFUSED.items():
        value = asked.get(name)
        if value is not None:
            what = f"{name}={value}" if isinstance(value, float) else name
            raise ValueError(f"{what} cannot be honoured by dcp attention: {remedy}")


def _sliding_mask(window: int, name: str | None) -> str:
    """The plan's mask for a layer with a sliding window."""
    if name is None:
        raise ValueError(
            f"sliding_window={window} cannot be honoured: plan a mask for it and name it with "
            "dcp_sliding_mask"
        )
    return name
