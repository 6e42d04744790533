"""Hugging Face models with dcp attention, through the library's own attention registry.

::

    register_attention()
    model = LlamaForCausalLM(LlamaConfig(…, attn_implementation="dcp", use_cache=False))
    executor.prepare(plan)
    logits = local_logits(model, tokens, positions, executor)

The model sees one row of this rank's tokens, in the plan's order. Every rank must call it, one
without tokens too, because it computes for the others. Which tokens see which is the plan's
business; whatever else a model asks of attention raises ``ValueError``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from dcp.runtime import AttentionExecutor

NAME = "dcp"
_REFUSED = {  # what a model may ask for and a plan cannot give, and what to do
    "attention_mask": "masks belong to the plan",
    "dropout": "set attention dropout to 0",
    "position_bias": "use a model without a position bias",
    "head_mask": "use a model without a head mask",
}


def register_attention() -> None:
    """Make ``attn_implementation="dcp"`` known to transformers."""
    AttentionInterface.register(NAME, dcp_attention)


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
    """
    local = len(tokens)
    if local == 0:
        tokens, positions = tokens.new_zeros(1), positions.new_zeros(1)
    output = model(
        input_ids=tokens[None], position_ids=positions[None], dcp_executor=executor, **others
    )
    return output.logits[0, :local]


def dcp_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    dcp_executor: AttentionExecutor | Any = None,
    dcp_mask: str | None = None,
    dcp_sliding_mask: str | None = None,
    sliding_window: int | None = None,
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
        softcap: cap of the scores (Gemma 2).
        s_aux: attention sinks ``[heads]`` (gpt-oss).

    Returns ``[1, local, heads, head_dim]`` and no weights.
    """
    if dcp_executor is None:
        raise ValueError('attention "dcp" needs the model called with dcp_executor=executor')
    _check_shapes(query, key)
    _refuse(attention_mask=attention_mask, dropout=dropout or None, **others)
    mask = dcp_mask if sliding_window is None else _sliding_mask(sliding_window, dcp_sliding_mask)
    # Under autocast the rotary embedding leaves queries and keys in fp32.
    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    stands_in = len(q) == 1 and dcp_executor.plan and not dcp_executor.plan.num_local_tokens
    if stands_in:
        q, k, v = q[:0], k[:0], v[:0]
    kv = torch.stack([k, v], dim=1)
    out = dcp_executor.attention(
        q.contiguous(), kv, mask=mask, scale=scaling, sink=s_aux, softcap=softcap
    )
    if stands_in:  # zeros that keep attention in the graph: its backward works for other ranks
        out = torch.cat([out, out.new_zeros(1, *out.shape[1:])])
    return out[None], None


def _check_shapes(query: torch.Tensor, key: torch.Tensor) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"dcp attention takes one row of local tokens, got {query.shape[0]} rows")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{query.shape[2]} queries for {key.shape[2]} keys: set use_cache=False")


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
