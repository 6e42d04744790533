"""A rank's part of a batch: documents read in their turn, or while the one before is computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dcp.data.datasets import shifted_labels, tokens_of
from dcp.data.exchange import Share
from dcp.program import RankPlan


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a batch.

    Attributes:
        tokens, labels, positions: int64 ``[local]``, possibly empty; the label of a token is the
            next one of its document (-100: none), its position is that in its own sequence.
        num_loss_tokens: labels that count, over all ranks: divide the summed loss by it.
        seqlens: tokens of every sequence of the whole batch, int64 ``[num_sequences]``.
        epoch, index: where the batch stands.
        plan_wait_seconds: how long planning held this rank up: asking for plans and waiting.
        planned_ahead: batches, this one included, whose plans were there when it was asked for;
            None on ranks that do not plan.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    num_loss_tokens: int
    seqlens: np.ndarray
    epoch: int
    index: int
    plan_wait_seconds: float
    planned_ahead: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        return int(self.seqlens.sum())


@dataclass(frozen=True)
class LocalTokens:
    """A rank's plan of a batch, with its tokens and their labels: int64 ``[local]`` each."""

    plan: RankPlan
    tokens: np.ndarray
    labels: np.ndarray


class DocumentReader:
    """Reads the documents of which a share gives this rank tokens; one background thread.

    Args:
        dataset: gives samples by index; used by the caller's thread and by the background one.
        rank: of this process, for messages.
    """

    def __init__(self, dataset: Any, *, rank: int) -> None:
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
        sequence, position = plan.sequence_ids, plan.positions
        tokens, labels = np.empty_like(position), np.empty_like(position)
        order = np.argsort(sequence, kind="stable")
        present, first = np.unique(sequence[order], return_index=True)
        for number, mine in zip(present.tolist(), np.split(order, first[1:]), strict=False):
            document, start, _, length = share.pieces[number].tolist()
            sample = self._dataset[document]
            ids = tokens_of(sample)
            if len(ids) != length:
                raise ValueError(
                    f"document {document} has {len(ids)} tokens on rank {self._rank} and "
                    f"{length} where it was planned: do all ranks read the same, unchanged data?"
                )
            tokens[mine] = ids[start + position[mine]]
            labels[mine] = shifted_labels(sample)[start + position[mine]]
        return LocalTokens(plan, tokens, labels)
