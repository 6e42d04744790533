"""DCPDataLoader: each rank's tokens and plan, with the next batches being planned meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.data.batching import DOCUMENT, START, STOP, TokenBudgetBatches, batches_from
from dcp.data.datasets import Samples, as_dataset, shifted_labels, tokens_of
from dcp.data.exchange import Planned, Share, make_exchange
from dcp.data.messages import request_to_bytes
from dcp.data.planning import PlanningPool
from dcp.program import RankPlan

MaskFn = Callable[[list[int], Sequence[Any]], Any]


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a batch.

    Attributes:
        tokens, labels, positions: int64 ``[local]``, possibly empty; the label of a token is the
            next one of its document (-100: none), its position is that in its own sequence.
        num_loss_tokens: labels that count, over all ranks: divide the summed loss by it.
        seqlens: tokens of every sequence of the whole batch, int64 ``[num_sequences]``.
        epoch, index: where the batch stands.
        plan_wait_seconds: how long this rank waited for the plan.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    num_loss_tokens: int
    seqlens: np.ndarray
    epoch: int
    index: int
    plan_wait_seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        return int(self.seqlens.sum())


class DCPDataLoader:
    """Yields ``(local_batch, rank_plan)``: this rank's share of batch after batch.

    Iterating goes on from where the last iteration stopped, to the end of that epoch; the next
    ``for`` loop is the next epoch. The planning rank plans ``look_ahead`` batches ahead in worker
    processes and leaves every rank its share in the group's store; all ranks iterate in step.

    Args:
        dataset: anything with a length and an index that gives token vectors, or mappings with
            ``input_ids`` and maybe ``labels``; only the planning rank asks for all lengths.
        mask_fn: the name of a mask, or ``fn(seqlens, samples)`` that returns one mask per sequence
            (an ``AttnMask``, a range tensor or a name), or such lists by mask name. It runs on the
            planning rank; ``samples`` are read when they are indexed.
        spec: heads and dtype of attention.
        cluster: the machine, with as many devices as the group has ranks; by default one node.
        tokens_per_batch: the budget of a batch, over all ranks.
        group: a ``torch.distributed`` group (constructing the loader is then collective), or None
            for a world of one rank.
        max_seqlen: longest sequence; None is the budget.
        over_long: what a document longer than that does: ``"raise"`` or ``"split"``.
        seed: of the order of documents, which differs by epoch; None keeps their own order.
        mask_weights: layers that use each mask, where ``mask_fn`` names several.
        look_ahead: batches being planned before they are asked for.
        num_workers: planning processes of a planning rank; 0 plans in this one, unhidden.
        planning_ranks: ranks that plan, in turn; iteration ``i`` belongs to one of them.
        device: where the tensors go.
        timeout_seconds: how long a rank waits for a plan before it raises ``PlanningError``.
        plan_options: keywords of ``dcp.plan``, such as ``{"strategy": "zigzag"}``.

    Raises:
        ValueError: an empty dataset, an over-long document, a cluster of another size, a wrong
            mask; always before the batch in question is yielded.
    """

    def __init__(
        self,
        dataset: Any,
        mask_fn: MaskFn | str = "causal",
        *,
        spec: AttentionSpec,
        tokens_per_batch: int,
        cluster: Cluster | None = None,
        group: Any = None,
        max_seqlen: int | None = None,
        over_long: str = "raise",
        seed: int | None = 0,
        mask_weights: Mapping[str, float] | None = None,
        look_ahead: int = 4,
        num_workers: int = 1,
        planning_ranks: Sequence[int] = (0,),
        device: torch.device | str = "cpu",
        timeout_seconds: float = 600.0,
        plan_options: Mapping[str, Any] | None = None,
    ) -> None:
        if look_ahead < 1:
            raise ValueError(f"look_ahead must be 1 or more, got {look_ahead}")
        self.dataset, self.spec, self.device = as_dataset(dataset), spec, device
        self._mask_fn, self._mask_weights = mask_fn, mask_weights
        self._order: dict[str, Any] = {
            "tokens_per_batch": tokens_per_batch,
            "max_seqlen": max_seqlen,
            "over_long": over_long,
            "seed": seed,
        }
        self._look_ahead, self._timeout = look_ahead, timeout_seconds
        self._plan_options = dict(plan_options or {})
        self._exchange = make_exchange(group, timeout_seconds=timeout_seconds)
        num_ranks = self._exchange.num_ranks
        self.cluster = cluster or Cluster(num_nodes=1, devices_per_node=num_ranks)
        if self.cluster.num_ranks != num_ranks:
            raise ValueError(
                f"the cluster has {self.cluster.num_ranks} devices and the group {num_ranks} ranks"
            )
        self._planning_ranks = tuple(planning_ranks)
        if not self._planning_ranks or not set(self._planning_ranks) <= set(range(num_ranks)):
            raise ValueError(f"planning_ranks {planning_ranks} are not ranks below {num_ranks}")
        self.plans = self._exchange.rank in self._planning_ranks
        self._batches: TokenBudgetBatches | None = None
        if self.plans:
            self._batches = TokenBudgetBatches(self.dataset.lengths, **self._order)
        self._pool = PlanningPool(num_workers if self.plans else 0)
        self._epoch, self._position, self._starts = 0, 0, 0
        self._start(epoch=0, position=0)

    # ------------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[tuple[LocalBatch, RankPlan]]:
        last = False
        while not last:
            share, waited = self._take()
            plan = share.rank_plan()
            batch = self._local_batch(share, plan, waited)
            last = share.last
            self._epoch, self._position = (
                (self._epoch + 1, 0) if last else (self._epoch, self._position + 1)
            )
            yield batch, plan

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, counting what was yielded; JSON-able, equal on all ranks."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``, on all ranks together, on any number of ranks.

        Raises ``ValueError`` where the dataset, budget or seed is another one: the order of
        batches would be, too.
        """
        for name, value in self._identity().items():
            if state.get(name, value) != value:
                raise ValueError(f"cannot resume: {name} was {state[name]!r} and is {value!r}")
        try:
            epoch, position = int(state["epoch"]), int(state["position"])
        except KeyError as error:
            raise ValueError(f"cannot resume: the loader's state lacks {error}") from None
        self._cancel()
        self._start(epoch=epoch, position=position)

    def sequence_batch(self, epoch: int, position: int) -> SequenceBatch:
        """Sequences and masks of one batch, on a planning rank: to plan or draw it again."""
        if self._batches is None:
            raise ValueError(f"rank {self._exchange.rank} does not plan; ask a planning rank")
        place = next(batches_from(self._batches, epoch=epoch, position=position))
        return self._sequence_batch(place.pieces)

    def close(self) -> None:
        """End the planning processes."""
        self._exchange.close()
        self._cancel()
        self._pool.close()

    def __enter__(self) -> DCPDataLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ planning ahead

    def _start(self, *, epoch: int, position: int) -> None:
        self._epoch, self._position, self._iteration = epoch, position, 0
        self._starts += 1  # tells the shares of this run from stale ones
        self._pending: dict[int, Planned] = {}
        if self._batches is not None:
            places = enumerate(batches_from(self._batches, epoch=epoch, position=position))
            turn = len(self._planning_ranks)
            mine = self._planning_ranks.index(self._exchange.rank)
            self._places = islice(places, mine, None, turn)

    def _take(self) -> tuple[Share, float]:
        """This rank's share of the next batch, and the seconds it was waited for."""
        iteration, self._iteration = self._iteration, self._iteration + 1
        planner = self._planning_ranks[iteration % len(self._planning_ranks)]
        if self.plans:
            self._plan_ahead()
        began = time.perf_counter()
        if planner == self._exchange.rank:
            share = self._pending.pop(iteration).own_share(self._timeout)
        else:
            share = self._exchange.fetch(self._key(iteration), planner)
        return share, time.perf_counter() - began

    def _plan_ahead(self) -> None:
        while len(self._pending) <= self._look_ahead:
            iteration, place = next(self._places)
            share = Share(self._full_pieces(place.pieces), 0, place.last, b"")
            try:
                share = replace(share, num_loss_tokens=self._count_loss_tokens(place.pieces))
                request = request_to_bytes(
                    self._sequence_batch(place.pieces), self.spec, self.cluster, self._plan_options
                )
                future = self._pool.submit(request)
            except Exception as error:  # raised when its turn comes, here and on every rank
                future = Future()
                future.set_exception(error)
            self._pending[iteration] = Planned(self._exchange, self._key(iteration), share, future)

    def _key(self, iteration: int) -> str:
        return f"{self._starts}/{iteration}"

    def _cancel(self) -> None:
        for planned in self._pending.values():
            planned.future.cancel()
        self._pending = {}

    # ------------------------------------------------------------------ batches

    def _identity(self) -> dict[str, Any]:
        """What the order of batches depends on, as far as this rank knows it."""
        identity = {"num_documents": len(self.dataset), **self._order}
        if self._batches is not None:
            identity["document_tokens"] = int(self._batches.lengths.sum())
        return identity

    def _full_pieces(self, pieces: np.ndarray) -> np.ndarray:
        """Pieces with each document's length, for the readers to check theirs against."""
        return np.column_stack([pieces, self.dataset.lengths[pieces[:, DOCUMENT]]])

    def _count_loss_tokens(self, pieces: np.ndarray) -> int:
        return sum(self.dataset.num_loss_tokens(*piece) for piece in pieces.tolist())

    def _sequence_batch(self, pieces: np.ndarray) -> SequenceBatch:
        seqlens = (pieces[:, STOP] - pieces[:, START]).tolist()
        masks = self._mask_fn
        if callable(masks):
            masks = masks(seqlens, Samples(self.dataset, pieces))
        return SequenceBatch(seqlens, masks, weights=self._mask_weights)

    def _local_batch(self, share: Share, plan: RankPlan, waited: float) -> LocalBatch:
        """Read the documents of which this rank owns tokens, and take those tokens."""
        sequence, position = plan.sequence_ids, plan.positions
        tokens, labels = np.empty_like(position), np.empty_like(position)
        order = np.argsort(sequence, kind="stable")
        present, first = np.unique(sequence[order], return_index=True)
        for number, mine in zip(present.tolist(), np.split(order, first[1:]), strict=False):
            document, start, _, length = share.pieces[number].tolist()
            sample = self.dataset[document]
            ids = tokens_of(sample)
            if len(ids) != length:
                raise ValueError(
                    f"document {document} has {len(ids)} tokens on rank {self._exchange.rank} and "
                    f"{length} where it was planned: do all ranks read the same, unchanged data?"
                )
            tokens[mine] = ids[start + position[mine]]
            labels[mine] = shifted_labels(sample)[start + position[mine]]
        return LocalBatch(
            tokens=torch.from_numpy(tokens).to(self.device),
            labels=torch.from_numpy(labels).to(self.device),
            positions=torch.from_numpy(position).to(self.device),
            num_loss_tokens=share.num_loss_tokens,
            seqlens=share.pieces[:, STOP] - share.pieces[:, START],
            epoch=self._epoch,
            index=self._position,
            plan_wait_seconds=waited,
        )
