"""A rank's part of a batch: documents read in their turn, or while the one before is computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dcp.data.batching import DOCUMENT, START, STOP
from dcp.data.datasets import SampleDataset
from dcp.data.exchange import Share
from dcp.data.samples import Sample
from dcp.data.segments import piece_labels, piece_positions
from dcp.program import RankPlan


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a batch.

    Attributes:
        tokens, labels, positions: int64 ``[local]``, possibly empty; the label of a token is the
            next one of its document (-100: none), its position is that in its own sequence. Both
            follow the segments of the mask: positions begin anew, and its last token predicts
            nothing.
        sample_ids, sequence_ids: of each token, its document in the dataset, and the number of its
            sequence in the batch: int64 ``[local]``.
        fields: the loader's ``fields``, ``[local]`` or ``[local, …]`` each.
        num_loss_tokens: labels that count, over all ranks; 0 in a batch without any, see
            :meth:`mean_loss`.
        seqlens: tokens of every sequence of the whole batch, int64 ``[num_sequences]``.
        pieces: (document, start, stop) of every sequence: int64 ``[num_sequences, 3]``.
        token_indices: number of each token in the whole batch, int64 ``[local]``.
        epoch, index: where the batch stands.
        plan_wait_seconds: how long planning held this rank up: asking for plans and waiting.
        planned_ahead: batches, this one included, whose plans were there when it was asked for;
            None on ranks that do not plan.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    sample_ids: torch.Tensor
    sequence_ids: torch.Tensor
    fields: dict[str, torch.Tensor]
    num_loss_tokens: int
    pieces: np.ndarray
    token_indices: torch.Tensor
    epoch: int
    index: int
    plan_wait_seconds: float
    planned_ahead: int | None

    @property
    def seqlens(self) -> np.ndarray:
        lengths: np.ndarray = self.pieces[:, STOP] - self.pieces[:, START]
        return lengths

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        return int(self.seqlens.sum())

    def rows_to_fill(self, multiple: int) -> int:
        """Rows to add behind the local tokens for a multiple of ``multiple``, and at least one."""
        local = len(self.tokens)
        return max(-(-local // multiple), 1) * multiple - local

    def mean_loss(self, summed_loss: torch.Tensor) -> torch.Tensor:
        """This rank's part of the mean over all ranks' labels, from the sum over its own.

        Parts of all ranks add up to the mean; they are 0, not NaN, in a batch without labels.
        """
        return summed_loss / max(self.num_loss_tokens, 1)


@dataclass(frozen=True)
class LocalTokens:
    """A rank's share of a batch, its plan, and what it reads for it, ``[local]`` each."""

    share: Share
    plan: RankPlan
    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    fields: dict[str, np.ndarray]

    def batch(self, device: torch.device | str, **place: Any) -> LocalBatch:
        """As tensors on a device; ``place`` is the rest of :class:`LocalBatch`."""

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        sequence = self.plan.sequence_ids
        return LocalBatch(
            tokens=tensor(self.tokens),
            labels=tensor(self.labels),
            positions=tensor(self.positions),
            sample_ids=tensor(self.share.pieces[sequence, DOCUMENT]),
            sequence_ids=tensor(sequence),
            fields={name: tensor(values) for name, values in self.fields.items()},
            num_loss_tokens=self.share.num_loss_tokens,
            pieces=self.share.pieces[:, : STOP + 1],
            token_indices=tensor(self.plan.token_indices),
            **place,
        )


class DocumentReader:
    """Reads the documents of which a share gives this rank tokens; one background thread.

    Args:
        dataset: gives samples by index; used by the caller's thread and by the background one.
        rank: of this process, for messages.
    """

    def __init__(self, dataset: SampleDataset, *, rank: int) -> None:
        self._dataset, self._rank = dataset, rank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcp-reading")
        self._begun: dict[Share, Future[LocalTokens]] = {}

    def begin(self, shares: Sequence[Share]) -> None:
        """Read these in the background, in this order, and no others."""
        for share in self._begun.keys() - set(shares):
            self._begun.pop(share).cancel()
        for share in shares:
            if share not in self._begun:
                self._begun[share] = self._thread.submit(self._read, share)

    def read(self, share: Share) -> LocalTokens:
        """The tokens of a share; ``ValueError`` where a document has not the planned length."""
        begun = self._begun.pop(share, None)
        return self._read(share) if begun is None else begun.result()

    def close(self) -> None:
        """End the thread, once the batch that it is reading is read."""
        self.begin(())
        self._thread.shutdown()

    def _read(self, share: Share) -> LocalTokens:
        plan = share.rank_plan()
        sequence, offset = plan.sequence_ids, plan.positions
        tokens, labels, positions = (np.empty_like(offset) for _ in range(3))
        fields = {
            name: np.empty((len(offset), *shape), dtype)
            for name, (dtype, shape) in share.fields.items()
        }
        order = np.argsort(sequence, kind="stable")
        present, first = np.unique(sequence[order], return_index=True)
        for number, mine in zip(present.tolist(), np.split(order, first[1:]), strict=False):
            document, start, stop, length = share.pieces[number].tolist()
            sample = self._sample(document, length)
            segments = share.segments_of(number)
            at = offset[mine]
            tokens[mine] = sample.tokens[start + at]
            labels[mine] = piece_labels(sample, start, stop, segments)[at]
            positions[mine] = piece_positions(sample, start, stop, segments, document)[at]
            for name, values in fields.items():
                values[mine] = sample.fields[name][start + at]
        return LocalTokens(share, plan, tokens, labels, positions, fields)

    def _sample(self, document: int, length: int) -> Sample:
        sample = self._dataset.sample(document)
        if len(sample.tokens) != length:
            raise ValueError(
                f"document {document} has {len(sample.tokens)} tokens on rank {self._rank} and "
                f"{length} where it was planned: do all ranks read the same, unchanged data?"
            )
        return sample
