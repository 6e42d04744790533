"""DCPDataLoader: each rank's tokens and plan, with the next batches being planned meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.data.ahead import LookAhead, Taken
from dcp.data.batching import (
    DOCUMENT,
    START,
    STOP,
    PlacedBatch,
    TokenBudgetBatches,
    batches_from,
)
from dcp.data.datasets import Samples, as_dataset, shifted_labels, tokens_of
from dcp.data.exchange import Share, make_exchange
from dcp.data.messages import request_to_bytes
from dcp.data.planning import Pool
from dcp.data.pools import open_pool
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


class DCPDataLoader:
    """Yields ``(local_batch, rank_plan)``: this rank's share of batch after batch.

    Iterating goes on from where the last iteration stopped, to the end of that epoch; the next
    ``for`` loop is the next epoch. Planning ranks plan ahead in worker processes, each batch on one
    of them, and leave every rank its share in the group's store; all ranks iterate in step. Where
    a rank loses its pool of workers, the other planning ranks plan its batches, too.

    Args:
        dataset: anything with a length and an index that gives token vectors, or mappings with
            ``input_ids`` and maybe ``labels``; only planning ranks ask for all lengths.
        mask_fn: the name of a mask, or ``fn(seqlens, samples)`` that returns one mask per sequence
            (an ``AttnMask``, a range tensor or a name), or such lists by mask name. It runs on
            planning ranks; ``samples`` are read when they are indexed.
        spec: heads and dtype of attention, as each rank computes it.
        cluster: the machine, with as many devices as attention has ranks; by default one node.
        tokens_per_batch: the budget of a batch, over all ranks.
        group: the ``torch.distributed`` group of all ranks that use the loader (constructing it is
            then collective), or None for a world of one rank.
        attention_group: the group over which this rank's attention runs; None is ``group``. Ranks
            with the same rank in theirs, such as the members of a tensor- or pipeline-parallel
            group, share a plan and get the same tokens.
        max_seqlen: longest sequence; None is the budget.
        over_long: what a document longer than that does: ``"raise"`` or ``"split"``.
        seed: of the order of documents, which differs by epoch; None keeps their own order.
        packing, bucket_window: how batches are filled, see :class:`TokenBudgetBatches`.
        mask_weights: layers that use each mask, where ``mask_fn`` names several.
        look_ahead: batches that each planning rank plans before they are asked for.
        num_workers: planning processes of a planning rank; 0 plans in this one, unhidden.
        planning_pool: where planning ranks plan: ``"processes"`` of theirs, ``"ray"``, or an own
            :class:`dcp.data.Pool`.
        planning_ranks: ranks that plan, in turn; None is the first rank of each node, with Ray
            rank 0.
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
        attention_group: Any = None,
        max_seqlen: int | None = None,
        over_long: str = "raise",
        seed: int | None = 0,
        packing: str = "first_fit",
        bucket_window: int = 0,
        mask_weights: Mapping[str, float] | None = None,
        look_ahead: int = 4,
        num_workers: int = 1,
        planning_pool: str | Pool = "processes",
        planning_ranks: Sequence[int] | None = None,
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
            "packing": packing,
            "bucket_window": bucket_window,
        }
        self._plan_options = dict(plan_options or {})
        self._exchange = make_exchange(group, attention_group, timeout_seconds=timeout_seconds)
        plan_ranks = self._exchange.plan_ranks
        self.cluster = cluster or Cluster(num_nodes=1, devices_per_node=max(plan_ranks) + 1)
        if self.cluster.num_ranks != max(plan_ranks) + 1:
            raise ValueError(
                f"the cluster has {self.cluster.num_ranks} devices and attention "
                f"{max(plan_ranks) + 1} ranks"
            )
        if planning_ranks is None:
            nodes = self.cluster.node_of_rank[np.array(plan_ranks)].tolist()
            one = planning_pool == "ray"  # which has the cores of all nodes
            planning_ranks = [0] if one else sorted(nodes.index(node) for node in set(nodes))
        num_ranks = self._exchange.num_ranks
        if not planning_ranks or not set(planning_ranks) <= set(range(num_ranks)):
            raise ValueError(f"planning_ranks {planning_ranks} are not ranks below {num_ranks}")
        self.planning_ranks = tuple(dict.fromkeys(planning_ranks))
        self._batches: TokenBudgetBatches | None = None
        self._pool: Pool | None = None
        with self._together():
            if self._exchange.rank in self.planning_ranks:
                self._batches = TokenBudgetBatches(self.dataset.lengths, **self._order)
                self._pool = open_pool(planning_pool, num_workers=num_workers)
        self._ahead = LookAhead(
            self._exchange,
            self.planning_ranks,
            self._pool,
            self._prepare,
            look_ahead=look_ahead,
            timeout_seconds=timeout_seconds,
        )
        self._epoch, self._position = 0, 0
        self._start(epoch=0, position=0)

    @property
    def plans(self) -> bool:
        """Whether this rank is one of those that plan."""
        return self._pool is not None

    # ------------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[tuple[LocalBatch, RankPlan]]:
        last = False
        while not last:
            taken = self._ahead.take()
            plan = taken.share.rank_plan()
            batch = self._local_batch(taken, plan)
            last = taken.share.last
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
        with self._together():
            for name, value in self._identity().items():
                if state.get(name, value) != value:
                    raise ValueError(f"cannot resume: {name} was {state[name]!r} and is {value!r}")
            try:
                epoch, position = int(state["epoch"]), int(state["position"])
            except KeyError as error:
                raise ValueError(f"cannot resume: the loader's state lacks {error}") from None
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
        self._ahead.stop()
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> DCPDataLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ planning ahead

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What fails in here on one rank fails on all; collective."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self._exchange.agree(failed)

    def _start(self, *, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        places = None
        if self._batches is not None:
            places = batches_from(self._batches, epoch=epoch, position=position)
        self._ahead.start(places)

    def _prepare(self, place: PlacedBatch) -> tuple[Share, bytes]:
        """A batch's share, without plan, and the request for its plan."""
        pieces = place.pieces
        # with each document's length, for the readers to check theirs against
        full = np.column_stack([pieces, self.dataset.lengths[pieces[:, DOCUMENT]]])
        num_loss_tokens = sum(self.dataset.num_loss_tokens(*piece) for piece in pieces.tolist())
        request = request_to_bytes(
            self._sequence_batch(pieces), self.spec, self.cluster, self._plan_options
        )
        return Share(full, num_loss_tokens, place.last, b""), request

    # ------------------------------------------------------------------ batches

    def _identity(self) -> dict[str, Any]:
        """What the order of batches depends on, as far as this rank knows it."""
        identity = {"num_documents": len(self.dataset), **self._order}
        if self._batches is not None:
            identity["document_tokens"] = int(self._batches.lengths.sum())
        return identity

    def _sequence_batch(self, pieces: np.ndarray) -> SequenceBatch:
        seqlens = (pieces[:, STOP] - pieces[:, START]).tolist()
        masks = self._mask_fn
        if callable(masks):
            masks = masks(seqlens, Samples(self.dataset, pieces))
        return SequenceBatch(seqlens, masks, weights=self._mask_weights)

    def _local_batch(self, taken: Taken, plan: RankPlan) -> LocalBatch:
        """Read the documents of which this rank owns tokens, and take those tokens."""
        share = taken.share
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
            plan_wait_seconds=taken.waited_seconds,
            planned_ahead=taken.planned_ahead,
        )
