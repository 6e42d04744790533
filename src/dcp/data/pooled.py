"""Samples that each rank brings at run time as one batch of all, and their values on the way home.

A rank reads its own samples and makes their masks, as the loader would; what it read travels to all
ranks, in one checked message each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dcp import wire
from dcp.batch import SequenceBatch
from dcp.data.exchange import Exchange
from dcp.data.messages import batch_from_wire, batch_to_wire
from dcp.data.samples import IGNORED, KNOWN, SampleFormat
from dcp.data.segments import agreed_segments, piece_labels, piece_positions

_KIND = "pooled-samples"
_KEYS = (*KNOWN, "answer_lengths")  # of a sample; others are not read


@dataclass(frozen=True)
class SampleReader:
    """Reads a rank's own samples.

    Args:
        masks_of: of a length and a sample's mapping: what :class:`dcp.SequenceBatch` takes as the
            masks of that one sequence.
        weights: layers that use each mask; None: all masks have the same.
        vocab_size: of the model.
        rank: of this process, for messages.
    """

    masks_of: Callable[[int, Mapping[str, Any]], Any]
    weights: Mapping[str, float] | None
    vocab_size: int | None
    rank: int

    def message(self, samples: Sequence[Any], asked: Mapping[str, Any]) -> bytes:
        """The samples, and what this rank ``asked`` for, which must be the same on all ranks.

        Raises ``ValueError``, with rank and sample, for a sample that is none.
        """
        found, columns = [], [np.zeros((3, 0), dtype=np.int64)]
        for number, raw in enumerate(samples):
            try:
                batch, column = self._read(raw, number)
            except ValueError as error:
                raise ValueError(f"sample {number} of rank {self.rank}: {error}") from None
            found.append(batch)
            columns.append(column)
        meta, arrays = batch_to_wire(_joined(found, weights=self.weights))
        arrays |= {"columns": np.concatenate(columns, axis=1)}
        return wire.pack(_KIND, {"asked": asked, "batch": meta}, arrays)

    def _read(self, raw: Any, number: int) -> tuple[SequenceBatch, np.ndarray]:
        """A sample's mask, and its tokens, labels and positions: int64 ``[3, n]``."""
        entries = raw if isinstance(raw, Mapping) else {"input_ids": raw}
        known = {name: entries[name] for name in _KEYS if name in entries}
        form = SampleFormat(ignore=("answer_lengths",), vocab_size=self.vocab_size)
        sample = form.read(known, number)
        length = len(sample.tokens)
        batch = SequenceBatch([length], self.masks_of(length, entries), weights=self.weights)
        masks = {name: mask for name, (mask,) in batch.masks.items()}
        segments = agreed_segments(masks, sample.positions, number)
        labels = piece_labels(sample, 0, length, segments)
        positions = piece_positions(sample, 0, length, segments, number)
        return batch, np.stack([sample.tokens, labels, positions])


@dataclass(frozen=True)
class PooledSamples:
    """The samples of all ranks, rank by rank.

    Attributes:
        columns: tokens, labels and positions, int64 ``[3, tokens]``.
        seqlens: tokens of each sample.
        num_samples: of each rank.
        parts: each rank's sequences and masks, as they travel.
    """

    columns: np.ndarray
    seqlens: np.ndarray
    num_samples: np.ndarray
    parts: list[tuple[dict[str, Any], dict[str, np.ndarray]]]

    @classmethod
    def of(cls, messages: Sequence[bytes]) -> PooledSamples:
        """Of every rank's message; ``ValueError`` where ranks ask for different things."""
        received = [wire.unpack(_KIND, message) for message in messages]
        asked = [meta["asked"] for meta, _ in received]
        for rank, other in enumerate(asked):
            if other != asked[0]:
                raise ValueError(
                    f"rank {rank} asks for {other}, rank 0 for {asked[0]}: call with the same "
                    "options on all ranks, and with gradients on all or none"
                )
        seqlens = [arrays["seqlens"] for _, arrays in received]
        return cls(
            columns=np.concatenate([arrays.pop("columns") for _, arrays in received], axis=1),
            seqlens=np.concatenate(seqlens),
            num_samples=np.array([len(each) for each in seqlens]),
            parts=[(meta["batch"], arrays) for meta, arrays in received],
        )

    @property
    def labels(self) -> np.ndarray:
        """Of each token, -100 where it has none that counts: int64 ``[tokens]``."""
        labels: np.ndarray = self.columns[1]
        return labels

    @property
    def first_token(self) -> np.ndarray:
        """Of each rank's samples, and the total: int64 ``[ranks + 1]``."""
        ends = np.append(0, np.cumsum(self.seqlens))
        first: np.ndarray = ends[np.append(0, np.cumsum(self.num_samples))]
        return first

    def num_labels(self, rank: int) -> list[int]:
        """Labels that count of each of a rank's samples."""
        sample = np.repeat(np.arange(len(self.seqlens)), self.seqlens)
        counts = np.bincount(sample[self.labels != IGNORED], minlength=len(self.seqlens))
        own: list[int] = np.split(counts, np.cumsum(self.num_samples))[rank].tolist()
        return own

    def batch(self, weights: Mapping[str, float] | None) -> SequenceBatch:
        """The sequences of all ranks with their masks."""
        return _joined([batch_from_wire(*part) for part in self.parts], weights=weights)


def _joined(
    batches: Sequence[SequenceBatch], *, weights: Mapping[str, float] | None
) -> SequenceBatch:
    """Batches as one; those without sequences may not know the names of the masks."""
    some = [batch for batch in batches if len(batch.seqlens)]
    if not some:
        return SequenceBatch([], dict.fromkeys(weights, "causal") if weights else "causal")
    names = some[0].mask_names
    masks = {name: [mask for batch in some for mask in batch.masks[name]] for name in names}
    return SequenceBatch(np.concatenate([b.seqlens for b in some]), masks, weights=weights)


# ---------------------------------------------------------------------- the way home


def send_home(
    values: Tensor, tokens: np.ndarray, pool: PooledSamples, exchange: Exchange, group: Any
) -> Tensor:
    """Values of this rank's own samples, in the order of their tokens; collective, differentiable.

    Args:
        values: of the tokens that this rank computed, ``[n, …]``, of the same dtype and shape
            behind ``n`` on all ranks.
        tokens: their numbers in the batch, int64 ``[n]``, in any order.
        group: the process group of ``exchange``; None for a process alone.
    """
    order, rank = np.argsort(tokens), exchange.rank
    held = [np.frombuffer(m, dtype=np.int64) for m in exchange.gather(tokens[order].tobytes())]
    ends = [np.searchsorted(each, pool.first_token) for each in held]
    mine = [each[end[rank] : end[rank + 1]] for each, end in zip(held, ends, strict=True)]
    values = values[torch.from_numpy(order).to(values.device)]
    if group is not None:
        counts = np.diff(ends[rank]).tolist(), [len(each) for each in mine]
        values = _Dealt.apply(values, *counts, group)
    return values[torch.from_numpy(np.argsort(np.concatenate(mine))).to(values.device)]


class _Dealt(torch.autograd.Function):
    """Rows dealt out to ranks; their gradients come back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int], group: Any) -> Any:
        ctx.back = receives, sends, group
        return _deal(rows, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _deal(grads[0], *ctx.back), None, None, None


def _deal(rows: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
    found = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), receives, sends, group=group)
    return found
