"""DCPDataLoader: each rank's tokens and plan, with the next batches being planned meanwhile."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.data.ahead import LookAhead
from dcp.data.batching import BatchesFrom, PlacedBatch, TokenBudgetBatches
from dcp.data.contents import Preparation
from dcp.data.datasets import SampleDataset, as_dataset
from dcp.data.dealing import dealing
from dcp.data.exchange import Exchange, Share
from dcp.data.groups import batches_of
from dcp.data.identity import facts_of
from dcp.data.learning import Learning
from dcp.data.pool import Pool, open_pool
from dcp.data.reading import DocumentReader, LocalBatch
from dcp.data.samples import SampleFormat, as_names
from dcp.data.streaming import DocumentStream, is_stream
from dcp.program import RankPlan
from dcp.rates import RateFit
from dcp.runtime import AttentionExecutor

MaskFn = Callable[[list[int], Sequence[Any]], Any]


class DCPDataLoader:
    """Yields ``(local_batch, rank_plan)``: this rank's share of batch after batch.

    Iterating goes on from where the last iteration stopped, to the end of that epoch; the next
    ``for`` loop is the next epoch. Planning ranks plan ahead in worker processes, each batch on one
    of them, and leave every rank its share in the group's store; all ranks iterate in step. Where
    a rank loses its pool of workers, the other planning ranks plan its batches, too.

    Args:
        dataset: anything with a length and an index that gives token vectors, or mappings with
            ``input_ids`` and what :class:`dcp.data.SampleFormat` lists; only planning ranks ask
            for all lengths. Or a stream of such, which every rank iterates, see
            :mod:`dcp.data.streaming`.
        mask_fn: the name of a mask, or ``fn(seqlens, samples)`` that returns one mask per sequence
            (an ``AttnMask``, a range tensor or a name), or such lists by mask name. It runs on
            planning ranks; ``samples`` are read when they are indexed.
        spec: heads and dtype of attention, as each rank computes it.
        cluster: the machine, with as many devices as attention has ranks; by default one node.
        tokens_per_batch: the budget of a batch, over all ranks.
        group: the ``torch.distributed`` group of all ranks that use the loader (constructing it is
            collective), or a mesh of one axis; None means the default group where
            ``torch.distributed`` is initialised, else this process alone.
        attention_group: the group over which this rank's attention runs; None is ``group``. Ranks
            with the same rank in theirs, such as the members of a tensor- or pipeline-parallel
            group, share a plan and get the same tokens.
        max_seqlen: longest sequence; None is the budget.
        over_long: what a document longer than that does: ``"raise"`` or ``"split"``.
        fields, ignore, vocab_size: of samples, see :class:`dcp.data.SampleFormat`: keys that are
            shared out like tokens, keys left to others (``mask_fn``, whose own ``sample_keys`` are
            ignored without), and the first id that is none.
        group_ids: a number or name per document: those of one come in one batch, None alone. None:
            the dataset's ``group_ids``, else the samples' ``group_id``.
        seed: of the order of documents, which differs by epoch; None keeps their own order.
        packing, bucket_window: how batches are filled, see :class:`TokenBudgetBatches`.
        micro_batches: of an optimiser step. The documents of that many batches are dealt to them so
            that each takes about as long, see :mod:`dcp.data.dealing`; an epoch's number of batches
            is a multiple of it.
        stream_window: documents of a stream that are shuffled and packed together, and held.
        mask_weights: layers that use each mask, where ``mask_fn`` names several.
        look_ahead: batches that each planning rank plans before they are asked for.
        prefetch: batches whose documents this rank reads in a thread, as soon as they are planned,
            while those before are computed; 0 reads each in the caller's thread, in its turn.
            The loader reads one document at a time in any case.
        num_workers: planning processes of a planning rank; 0 plans in this one, unhidden.
        planning_pool: where planning ranks plan: ``"processes"`` of theirs, ``"ray"``, or an own
            :class:`dcp.data.Pool`.
        planning_ranks: ranks that plan, in turn; None is the first rank of each node, with Ray
            rank 0.
        device: where the tensors go.
        timeout_seconds: how long a rank waits for a plan, or for another rank, before it raises
            ``PlanningError``.
        worker_timeout_seconds: how long a planning process may take for a batch before it is
            replaced; None goes by how long batches took, see :class:`PlanningPool`.
        plan_options: keywords of ``dcp.plan``, such as ``{"strategy": "zigzag"}``.

    Raises:
        ValueError: an empty dataset, an over-long document, a cluster of another size, a wrong
            mask; always before the batch in question is yielded. Also where ranks were given other
            options, documents (lengths, and the contents of some) or places to resume at; all
            ranks say which.
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
        fields: Sequence[str] = (),
        ignore: Sequence[str] = (),
        vocab_size: int | None = None,
        group_ids: Sequence[Any] | np.ndarray | None = None,
        seed: int | None = 0,
        packing: str = "first_fit",
        bucket_window: int = 0,
        micro_batches: int = 1,
        stream_window: int = 1024,
        mask_weights: Mapping[str, float] | None = None,
        look_ahead: int = 4,
        prefetch: int = 1,
        num_workers: int = 1,
        planning_pool: str | Pool = "processes",
        planning_ranks: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout_seconds: float = 600.0,
        worker_timeout_seconds: float | None = None,
        plan_options: Mapping[str, Any] | None = None,
    ) -> None:
        if look_ahead < 1:
            raise ValueError(f"look_ahead must be 1 or more, got {look_ahead}")
        if prefetch < 0:
            raise ValueError(f"prefetch must be 0 or more, got {prefetch}")
        self.spec, self.device, self._prefetch = spec, device, prefetch
        self._num_workers = num_workers
        ignore = (*getattr(mask_fn, "sample_keys", ()), *as_names(ignore))
        form = SampleFormat(fields, ignore, vocab_size)
        self._order: dict[str, Any] = {
            "tokens_per_batch": tokens_per_batch,
            "max_seqlen": max_seqlen,
            "over_long": over_long,
            "seed": seed,
            "packing": packing,
            "bucket_window": bucket_window,
        }
        self._exchange = Exchange(group, attention_group, timeout_seconds=timeout_seconds)
        self._stream: DocumentStream | None = None
        if is_stream(dataset):
            self._stream = DocumentStream(
                dataset,
                form,
                self._order,
                window=stream_window,
                read_ahead=prefetch > 0,
                rank=self._exchange.rank,
            )
            self._order["stream_window"] = stream_window
            self.dataset = SampleDataset(self._stream, form)
        else:
            self.dataset = as_dataset(dataset, form, group_ids=group_ids)
        self.cluster = _checked_cluster(cluster, self._exchange.plan_ranks)
        self.planning_ranks = self._choose_planning_ranks(planning_ranks, planning_pool)
        self._preparation = Preparation(
            self.dataset, mask_fn, mask_weights, spec, self.cluster, plan_options or {}
        )
        self._batches, self._pool = self._open(planning_pool, num_workers, worker_timeout_seconds)
        self._order["micro_batches"] = micro_batches
        self._deal = dealing(
            micro_batches, tokens_per_batch, self._preparation.seconds, self._batches
        )
        self._reader = DocumentReader(self.dataset, rank=self._exchange.rank)
        self._ahead = LookAhead(
            self._exchange,
            self.planning_ranks,
            self._pool,
            self._prepare,
            look_ahead=look_ahead,
            timeout_seconds=timeout_seconds,
        )
        self._learning: Learning | None = None
        self._epoch = self._position = self._num_batches = 0
        self._start(epoch=0, position=0)

    def _choose_planning_ranks(
        self, ranks: Sequence[int] | None, pool: str | Pool
    ) -> tuple[int, ...]:
        """Those given, else those that have the cores to plan with."""
        num_ranks = self._exchange.num_ranks
        if ranks is None:  # the first of each node, or one for Ray, which has the cores of all
            nodes = self.cluster.node_of_rank[np.array(self._exchange.plan_ranks)].tolist()
            firsts = sorted(nodes.index(node) for node in set(nodes))
            ranks = [0] if pool == "ray" else firsts
        if not ranks or not set(ranks) <= set(range(num_ranks)):
            raise ValueError(f"planning_ranks {ranks} are not ranks below {num_ranks}")
        return tuple(dict.fromkeys(ranks))

    def _open(
        self, pool: str | Pool, num_workers: int, timeout: float | None
    ) -> tuple[TokenBudgetBatches | None, Pool | None]:
        """What a planning rank plans, and where; collective."""
        with self._exchange.together():
            if self._exchange.rank in self.planning_ranks:
                batches = None
                if self._stream is None:
                    batches = batches_of(self.dataset.lengths, self.dataset.groups, **self._order)
                return batches, open_pool(
                    pool, num_workers=num_workers, worker_timeout_seconds=timeout
                )
        return None, None

    def learn_from(self, executor: AttentionExecutor) -> None:
        """From now on plan with the cluster's rates as they are found to be; collective.

        The executor's passes are timed, and the planning ranks fit the rates of ``cluster`` to what
        all ranks measured. Plans then depend on the machine and the moment; what they compute does
        not, but for the order of sums. Ranks begin by measuring their links with a few messages.
        Where training runs on GPUs, planning processes also spend half of the time that a step
        leaves them, up to 2 s a plan, unless ``plan_options`` have a ``time_budget``.
        """
        weights, options = self._preparation.mask_weights, self._preparation.plan_options
        spares = torch.device(self.device).type == "cuda" and "time_budget" not in options
        self._learning = Learning(
            executor,
            self._exchange,
            self.cluster,
            model_width=options.get("model_width"),
            num_layers=sum(weights.values()) if weights else 1.0,
            spare_workers=self._num_workers * len(self.planning_ranks) if spares else 0,
        )

    @property
    def rates(self) -> RateFit | None:
        """What this rank has learnt of the cluster: on planning ranks, after :meth:`learn_from`."""
        return self._learning.fit if self._learning is not None and self.plans else None

    @property
    def predicted_over_measured(self) -> float | None:
        """Of the attention of a late batch, after :meth:`learn_from`: its plan's seconds over those
        that this rank measured."""
        return None if self._learning is None else self._learning.predicted_over_measured

    @property
    def attention_wait_share(self) -> float | None:
        """Of the attention of a batch lately, the part in which this rank waited for messages; None
        before one was measured."""
        return None if self._learning is None else self._learning.attention_wait_share

    @property
    def time_budget(self) -> float | None:
        """Seconds that a plan may take now, after :meth:`learn_from`, by what steps leave; None
        where that is the plan options' own."""
        return None if self._learning is None else self._learning.time_budget

    def _prepare(self, place: PlacedBatch) -> tuple[Share, bytes]:
        if self._learning is None:
            return self._preparation.prepare(place, self.cluster)
        return self._preparation.prepare(place, self._learning.cluster, **self._learning.options())

    def _places(self, epoch: int, position: int) -> BatchesFrom:
        """The batches of a dataset with an index, from a place on; on planning ranks."""
        assert self._batches is not None
        return BatchesFrom(self._batches, epoch=epoch, position=position, deal=self._deal)

    @property
    def plans(self) -> bool:
        """Whether this rank is one of those that plan."""
        return self._pool is not None

    # ------------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[tuple[LocalBatch, RankPlan]]:
        last = False
        while not last:
            if self._learning is not None:
                self._learning.turn()
            taken = self._ahead.take()
            local = self._reader.read(taken.share)
            if self._learning is not None:
                self._learning.take(local.plan, taken.planner, taken.plans)
            if self._stream is not None:
                self._stream.advance(taken.share)
            self._reader.begin(self._ahead.upcoming(self._prefetch))
            batch = local.batch(
                self.device,
                epoch=self._epoch,
                index=self._position,
                plan_wait_seconds=taken.waited_seconds,
                planned_ahead=taken.planned_ahead,
            )
            last, self._num_batches = taken.share.last, taken.share.num_batches
            self._epoch, self._position = (
                (self._epoch + 1, 0) if last else (self._epoch, self._position + 1)
            )
            yield batch, local.plan

    def __len__(self) -> int:
        """All batches of the epoch to which the next batch belongs, known on every rank.

        Epochs may differ by some batches, as documents fall into them in another order. A stream
        hides the number: ``TypeError``.
        """
        if self._stream is not None:
            raise TypeError("a stream does not tell how many batches its epochs have: count them")
        return self._num_batches

    def count_batches(self, num_epochs: int) -> list[int]:
        """Batches of each of the first epochs, known on every rank; collective.

        ``TypeError`` for a stream.
        """
        _ = len(self)
        counts = [0] * num_epochs
        with self._exchange.together():
            if self._batches is not None:
                for epoch in range(num_epochs):
                    counts[epoch] = self._places(epoch, 0).num_batches
        return [self._exchange.largest(count) for count in counts]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, counting what was yielded; JSON-able, equal on all ranks but
        for what planning ranks have learnt (``rates``)."""
        state = {"epoch": self._epoch, "position": self._position, **self._identity()}
        if self.rates is not None:
            state["rates"] = self.rates.state_dict()
        return state if self._stream is None else state | {"stream": self._stream.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``, on all ranks together, on any number of ranks.

        Raises ``ValueError`` where the dataset, budget or seed is another one (the order of
        batches would be, too), or there is no such batch.
        """
        with self._exchange.together():
            for name, value in self._identity().items():
                if state.get(name, value) != value:
                    raise ValueError(f"cannot resume: {name} was {state[name]!r} and is {value!r}")
            if ("stream" in state) != (self._stream is not None):
                one, other = ("a", "no") if "stream" in state else ("no", "a")
                raise ValueError(f"cannot resume: the data was {one} stream and is {other} stream")
            try:
                epoch, position = int(state["epoch"]), int(state["position"])
            except KeyError as error:
                raise ValueError(f"cannot resume: the loader's state lacks {error}") from None
        if self.rates is not None and "rates" in state:
            self.rates.load_state_dict(state["rates"])
        self._start(epoch=epoch, position=position, place=state.get("stream"))

    def sequence_batch(self, epoch: int, position: int) -> SequenceBatch:
        """Sequences and masks of one batch, on a planning rank: to plan or draw it again."""
        if self._stream is not None:
            raise ValueError(
                "a batch of a stream cannot be had again: give a dataset with a length instead"
            )
        if self._batches is None:
            raise ValueError(f"rank {self._exchange.rank} does not plan; ask a planning rank")
        place = next(self._places(epoch, position))
        return self._preparation.sequence_batch(place.pieces)

    def close(self) -> None:
        """End the planning processes and the reading thread."""
        self._exchange.close()
        self._reader.close()
        self._ahead.stop()
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> DCPDataLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ planning ahead

    def _start(self, *, epoch: int, position: int, place: Mapping[str, Any] | None = None) -> None:
        """Go to a place, in a stream to that ``place``; collective, and
        ``ValueError`` where ranks differ."""
        facts = {"epoch": epoch, "position": position}
        self._exchange.compare(self._facts() | facts if self._exchange.num_ranks > 1 else facts)
        places: Iterator[PlacedBatch] | None = None
        num_batches = 0
        with self._exchange.together():
            if self._stream is not None:
                self._stream.start(epoch, place)
                if self.plans:
                    places = self._stream.batches(epoch, position, self._deal)
            elif self._batches is not None:
                places = indexed = self._places(epoch, position)
                num_batches = indexed.num_batches
        self._epoch, self._position = epoch, position
        self._num_batches = self._exchange.largest(num_batches)
        self._reader.begin(())
        self._ahead.start(places)

    def _identity(self) -> dict[str, Any]:
        """What the order of batches depends on, as far as this rank knows it."""
        if self._stream is not None:
            return dict(self._order)
        identity = {"num_documents": len(self.dataset), **self._order}
        if self._batches is not None:
            identity["document_tokens"] = int(self._batches.lengths.sum())
            if (groups := self.dataset.groups) is not None:
                identity["groups"] = zlib.crc32(groups.tobytes())
        return identity

    def _facts(self) -> dict[str, Any]:
        lengths = None if self._batches is None else self._batches.lengths
        number = None if self._stream else len(self.dataset)
        known = {"num_documents": number, **self._order, "planning_ranks": self.planning_ranks}
        return known | facts_of(self._preparation, lengths)


def _checked_cluster(cluster: Cluster | None, plan_ranks: Sequence[int]) -> Cluster:
    """A cluster with one device per rank of the plan."""
    num_ranks = max(plan_ranks) + 1
    cluster = cluster or Cluster(num_nodes=1, devices_per_node=num_ranks)
    if cluster.num_ranks != num_ranks:
        raise ValueError(
            f"the cluster has {cluster.num_ranks} devices and attention {num_ranks} ranks"
        )
    return cluster
