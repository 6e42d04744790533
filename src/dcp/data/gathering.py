"""Per-token results back to whole samples, on the ranks that ask, and from samples to tokens."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dcp.data.batching import DOCUMENT, START
from dcp.data.reading import LocalBatch
from dcp.ragged import starts
from dcp.runtime.agreement import Gathering
from dcp.runtime.communicator import GroupCommunicator
from dcp.runtime.group import resolve_group


def gather_samples(
    batch: LocalBatch, values: Tensor, *, group: Any = None, to: int | Sequence[int] | None = None
) -> dict[int, Tensor]:
    """A batch's per-token results by sample: ``{sample_id: [tokens of it in the batch, …]}``.

    Tokens are in the order of their document; of one that is split, only the batch's pieces are
    there. Collective; not differentiable. Rows travel to the ranks that ask, and to no others.

    Args:
        batch: this rank's, of the same batch on all ranks.
        values: one row per local token, ``[local, …]``, of one dtype and shape on all ranks.
        group: over which attention runs; see :func:`resolve_group`.
        to: ranks of it that get the result, the others get nothing: ``{}``. None: all.

    Raises ``ValueError`` on all ranks where the rows are not those of the batch.
    """
    group = resolve_group(group)
    rank, num_ranks = (
        (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    )
    asking = range(num_ranks) if to is None else [to] if isinstance(to, int) else list(to)
    if not set(asking) <= set(range(num_ranks)):
        raise ValueError(f"to={to} names ranks that are not below {num_ranks}")
    values = values.detach().contiguous()
    counts = _checked_counts(batch, values, group, rank)
    mine = torch.cat([_as_bytes(batch.token_indices.to(values.device)), _as_bytes(values)])
    row_bytes = 8 + int(np.prod(values.shape[1:])) * values.element_size()
    received = {
        peer: mine.new_empty(count * row_bytes)
        for peer, count in enumerate(counts)
        if rank in asking and count and peer != rank
    }
    if group is not None:
        sends = {peer: mine for peer in asking if peer != rank and counts[rank]}
        communicator = GroupCommunicator(group)
        communicator.connect(values.device)
        for _ in communicator.launch(sends, received):
            pass
    if rank not in asking:
        return {}
    whole = values.new_empty(batch.num_tokens, *values.shape[1:])
    for message in (mine, *received.values()):
        count = len(message) // row_bytes
        at, rows = message[: 8 * count].view(torch.int64), message[8 * count :]
        whole[at] = rows.view(values.dtype).view(count, *values.shape[1:])
    return _by_sample(batch, whole)


def scatter_samples(batch: LocalBatch, samples: Mapping[int, Tensor]) -> Tensor:
    """The rows of this rank's tokens, ``[local, …]``, of what :func:`gather_samples` returns.

    ``samples`` must hold those of which this rank has tokens. Nothing is sent.
    """
    like = next(iter(samples.values()), torch.empty(0))
    rows = like.new_empty(len(batch.tokens), *like.shape[1:])
    sample, sequence = batch.sample_ids.cpu().numpy(), batch.sequence_ids.cpu().numpy()
    sizes = batch.seqlens
    place = batch.token_indices.cpu().numpy() - starts(sizes)[sequence]
    place += _begins(batch)[sequence]
    for document in np.unique(sample).tolist():
        wanted = int(sizes[batch.pieces[:, DOCUMENT] == document].sum())
        if document not in samples or len(samples[document]) != wanted:
            found = (
                "is missing" if document not in samples else f"has {len(samples[document])} rows"
            )
            raise ValueError(f"sample {document} {found}, the batch has {wanted} tokens of it")
        mine = np.flatnonzero(sample == document)
        rows[mine] = samples[document][place[mine]]
    return rows


def _checked_counts(
    batch: LocalBatch, values: Tensor, group: dist.ProcessGroup | None, rank: int
) -> list[int]:
    """How many rows each rank has; collective."""
    kind = f"{values.dtype} {list(values.shape[1:])}"
    numbers = [len(values), len(batch.tokens), batch.num_tokens, zlib.crc32(kind.encode())]
    found = [numbers] if group is None else Gathering(group, numbers).numbers()
    for other, (rows, tokens, total, other_kind) in enumerate(found):
        if rows != tokens:
            raise ValueError(f"rank {other} gathers {rows} rows, it has {tokens} tokens")
        if (total, other_kind) != tuple(found[0][2:]):
            raise ValueError(
                f"rank {other} gathers from another batch, or rows of another dtype or shape, than "
                f"rank 0 (rank {rank} has {kind} per token): let all gather the same"
            )
    counts = [rows for rows, *_ in found]
    if sum(counts) != batch.num_tokens:
        raise ValueError(
            f"the ranks of group have {sum(counts)} tokens, the batch {batch.num_tokens}: give the "
            f"group over which attention runs"
        )
    return counts


def _by_sample(batch: LocalBatch, whole: Tensor) -> dict[int, Tensor]:
    parts = whole.split(batch.seqlens.tolist())
    order = np.lexsort((batch.pieces[:, START], batch.pieces[:, DOCUMENT]))
    found: dict[int, list[Tensor]] = {}
    for sequence in order.tolist():
        found.setdefault(int(batch.pieces[sequence, DOCUMENT]), []).append(parts[sequence])
    return {sample: torch.cat(of) for sample, of in found.items()}


def _begins(batch: LocalBatch) -> np.ndarray:
    """Where each sequence begins among the tokens of its sample in the batch."""
    document, start = batch.pieces[:, DOCUMENT], batch.pieces[:, START]
    order = np.lexsort((start, document))
    begins = np.empty_like(start)
    begins[order] = starts(batch.seqlens[order])
    first = np.full(int(document.max(initial=0)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, document, begins)
    result: np.ndarray = begins - first[document]
    return result


def _as_bytes(values: Tensor) -> Tensor:
    if not values.numel():  # an empty one may have no stride that a view can keep
        return values.new_empty(0, dtype=torch.uint8)
    return values.reshape(-1).view(torch.uint8)
