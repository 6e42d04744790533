"""Attention among tokens that are shared out, exact whatever the lengths, heads and ranks.

Over one's own sequence tokens are exchanged for heads (Ulysses, arXiv 2309.14509). Keys of another
sequence, a text's, are few: every rank gathers them, and its queries stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcp.datacentric.splitting import MAIN, OTHER, SharedTokens

Attend = Callable[..., Tensor]  # (query, key, value, attn_mask=…, **options)


def exchanged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attend: Attend,
    shared: SharedTokens,
    *,
    crossed: bool,
) -> Tensor:
    """``attend`` over all ranks' tokens; returns this rank's rows.

    Args:
        query, key, value: ``[batch, local tokens, heads, head_dim]``.
        mask: None, ``[batch, keys]``, or as scaled_dot_product_attention takes it: ``[batch or 1,
            heads or 1, queries or 1, keys]``. Keys are those of all ranks, or this rank's where a
            plan split the mask.
        crossed: keys are of the other sequence.

    Raises ``ValueError`` for a mask whose shape does not fit, and for one over both sequences where
    their order is not known.
    """
    shared.num_exchanges += 1
    heads = query.shape[2]
    if key.shape[2] != heads:  # grouped: each rank needs the keys of its own query heads
        key, value = (x.repeat_interleave(heads // x.shape[2], 2) for x in (key, value))
    if mask is not None and mask.dim() != 4:
        if mask.dim() != 2 or mask.shape[0] != len(query):
            raise ValueError(
                f"a mask of shape {list(mask.shape)} is not of batch, heads, queries, keys"
            )
        mask = mask[:, None, None]
    queries = shared.runs(query.shape[1], crossed=False)
    joint = not crossed or len(queries) > 1
    if joint or OTHER in shared.totals:
        keys = shared.runs(key.shape[1], crossed=not joint)
        if joint and keys != queries:
            raise ValueError(f"queries of {queries} tokens with keys of {keys}, which is no plan's")
        if mask is not None:
            mask = _whole(mask, queries, keys, key.shape[1], shared)
        if joint:
            return _by_heads(query, key, value, mask, attend, shared, queries)
        both = shared.group.gather(torch.stack([key, value]), dim=2, total=keys)
        key, value = both.unbind()
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, shared.group.part(mask.shape[2])]
    return attend(query, key, value, attn_mask=mask)


def _whole(
    mask: Tensor, queries: Sequence[int], keys: Sequence[int], local: int, shared: SharedTokens
) -> Tensor:
    """The mask, with the keys of all ranks, of which this one has ``local``."""
    if mask.shape[2] not in (1, sum(queries)) or mask.shape[3] not in (local, sum(keys)):
        raise ValueError(
            f"a mask of shape {list(mask.shape)} fits neither the {sum(queries)} queries and "
            f"{sum(keys)} keys of all ranks nor the {local} keys of this one"
        )
    if mask.shape[3] == local:
        return shared.group.gather(mask, dim=3, total=keys)
    if len(keys) > 1 and shared.order is None:
        raise ValueError(
            "a mask covers two sequences, and nothing says in which order: give "
            f"order={(OTHER, MAIN)}, or the other way round"
        )
    return mask


def _by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attend: Attend,
    shared: SharedTokens,
    total: Sequence[int],
) -> Tensor:
    group, heads = shared.group, query.shape[2]
    packed = torch.stack([query, key, value])
    query, key, value = group.switch(packed, gather=2, split=3, total=total).unbind()
    if mask is not None and mask.shape[1] == heads > 1:
        mask = mask[:, group.part(heads)]
    # a rank without heads keeps its place in the exchange of gradients
    done = attend(query, key, value, attn_mask=mask) if query.shape[2] else query
    return group.switch(done, gather=2, split=1, total=heads, parted=total)
