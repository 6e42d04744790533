"""Documents that must come in one batch, such as the answers to one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dcp.data.batching import DOCUMENT, START, STOP, TokenBudgetBatches

ALONE = -1


def group_numbers(groups: Sequence[Any] | np.ndarray, num_documents: int) -> np.ndarray:
    """Groups of any hashable name as numbers, int64 ``[n]``; None is a document by itself."""
    named = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(named) != num_documents:
        raise ValueError(f"group_ids names {len(named)} documents, the dataset has {num_documents}")
    number: dict[Any, int] = {}
    try:
        numbers = [ALONE if g is None else number.setdefault(g, len(number)) for g in named]
    except TypeError as error:
        raise ValueError(f"a group must be a number or a name: {error}") from None
    return np.array(numbers, dtype=np.int64)


@dataclass(frozen=True)
class GroupedBatches(TokenBudgetBatches):
    """Batches as :class:`TokenBudgetBatches` makes them, of whole groups instead of documents.

    Args:
        groups: documents of one number come in one batch, ``ALONE`` by themselves: int64 ``[n]``.

    Raises ``ValueError`` for a group of more tokens than a batch.
    """

    groups: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        super().__post_init__()
        worst = int(np.argmax(self._tokens))
        if self._tokens[worst] > self.tokens_per_batch:
            documents = np.unique(self._members[worst][:, DOCUMENT]).tolist()
            more = ", …" if len(documents) > 8 else ""
            raise ValueError(
                f"the group of documents {', '.join(map(str, documents[:8]))}{more} has "
                f"{self._tokens[worst]} tokens, more than tokens_per_batch="
                f"{self.tokens_per_batch}: raise the budget or make the group smaller"
            )

    def epoch(self, epoch: int, *window: int) -> Iterator[np.ndarray]:
        groups = TokenBudgetBatches(
            self._tokens,
            self.tokens_per_batch,
            seed=self.seed,
            packing=self.packing,
            bucket_window=self.bucket_window,
        )
        for chosen in groups.epoch(epoch, *window):
            yield np.concatenate([self._members[group] for group in chosen[:, DOCUMENT]])

    def units(self, pieces: np.ndarray) -> np.ndarray:
        alone = len(self.lengths) + np.arange(len(pieces))
        group = self.groups[pieces[:, DOCUMENT]]
        return np.where(group == ALONE, alone, group)

    @cached_property
    def _members(self) -> list[np.ndarray]:
        """The pieces of each group, groups in the order of their first document."""
        pieces = np.array(list(self._pieces(None)), dtype=np.int64)
        _, first, number = np.unique(self.units(pieces), return_index=True, return_inverse=True)
        number = np.argsort(np.argsort(first))[number]
        ends = np.cumsum(np.bincount(number))
        return np.split(pieces[np.argsort(number, kind="stable")], ends[:-1])

    @cached_property
    def _tokens(self) -> np.ndarray:
        """Tokens of each group."""
        return np.array([(of[:, STOP] - of[:, START]).sum() for of in self._members])


def batches_of(lengths: np.ndarray, groups: np.ndarray | None, **order: Any) -> TokenBudgetBatches:
    """Batches of documents, or of groups of them where there are any."""
    if groups is None:
        return TokenBudgetBatches(lengths, **order)
    return GroupedBatches(lengths, groups=groups, **order)
