"""What a loader learns from the batches it gave out: ranks' times, on their way to who plans.

Every rank hands the times of a batch's passes to the rank that planned it, through the loader's
store, when the next batches are asked for; that rank fits the cluster's rates to them
(:class:`dcp.rates.RateFit`), in a thread of its own, and plans what follows with the fit. Nobody
waits for anybody.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp import wire
from dcp.cluster import Cluster
from dcp.data.exchange import Exchange
from dcp.program import RankPlan
from dcp.rates import PassFigures, RateFit
from dcp.runtime import AttentionExecutor
from dcp.runtime.timing import PassTimes, figures_of_passes

KEPT_PASSES = 4096  # that a rank holds before it hands them in
OPEN_BATCHES = 16  # whose figures a planning rank still waits for
FIRST, EVERY = 16, 16  # batches that are handed in: the first ones, and then every so many
TRY_EVERY = 50  # batches, of which one runs by the second best plan if it may be the best
MOST_BEHIND = 0.05  # that such a plan may be predicted to be
STEPS = 8  # whose median is the time of a step
SPENT = 0.5  # of the time until a batch's plan is needed
BUDGETS = (0.5, 1.0, 2.0)  # seconds on one core: few, so that equal batches get equal plans
PROBE_BYTES = (1 << 10, 1 << 20)  # of messages that measure a link as learning begins
_KIND = "pass-times"


@dataclass(eq=False)
class _Batch:
    """A batch that this rank planned: every rank's plan, and figures as they come in."""

    plans: Sequence[bytes]
    figures: dict[int, list[PassFigures]] = field(default_factory=dict)


class Learning:
    """One rank's part. Constructing it is collective: the ranks measure their links.

    Args:
        executor: whose passes are timed.
        exchange: the ranks of the loader.
        cluster, model_width: see :class:`dcp.rates.RateFit`.
        num_layers: that a plan's predicted seconds are of: the sum of its masks' weights.
        spare_workers: planning processes, of all ranks, whose cores training leaves idle; 0: plans
            keep to their own ``time_budget``.

    Attributes:
        predicted_over_measured: seconds of attention in the last batch that was handed in, as its
            plan predicted them over what this rank measured.
        attention_wait_share: of that batch's attention, what part this rank waited for messages.
        time_budget: seconds of one core that a batch's plan may take while training computes; None
            where that is left to the plan's options.
    """

    def __init__(
        self,
        executor: AttentionExecutor,
        exchange: Exchange,
        cluster: Cluster,
        *,
        model_width: int | None,
        num_layers: float = 1.0,
        spare_workers: int = 0,
    ) -> None:
        self._exchange = exchange
        self._times: deque[PassTimes] = deque(maxlen=KEPT_PASSES)
        executor.times = self._times
        self._given: OrderedDict[int, tuple[int, dict[str, float]]] = OrderedDict()
        self._open: OrderedDict[int, _Batch] = OrderedDict()
        self._num_sent: dict[int, int] = {}
        self._num_heard = [0] * exchange.num_ranks
        self._num_taken = self._num_planned = 0
        self._num_layers, self._spare_workers = num_layers, spare_workers
        self._asked: deque[float] = deque(maxlen=STEPS + 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcp-rates")
        self._fitting: deque[Future[None]] = deque()
        self.predicted_over_measured: float | None = None
        self.attention_wait_share: float | None = None
        self.fit = RateFit(cluster, model_width=model_width)
        if executor.group is not None:
            self.fit.probe(**probe_links(executor.group, cluster))

    @property
    def cluster(self) -> Cluster:
        """As it is found to be."""
        return self.fit.cluster

    @property
    def time_budget(self) -> float | None:
        steps = np.diff(list(self._asked)[1:])  # the first batch is waited for
        if not self._spare_workers or len(steps) == 0:
            return None
        spare = SPENT * float(np.median(steps)) * self._spare_workers
        budgets = [budget for budget in BUDGETS if budget <= spare]
        return budgets[-1] if budgets else None

    def options(self) -> dict[str, Any]:
        """More options of the next plan: the time there is, and now and then the second best to
        try, where the two are predicted within the fit's error."""
        self._num_planned += 1
        options: dict[str, Any] = {}
        if (budget := self.time_budget) is not None:
            options["time_budget"] = budget
        if self._num_planned % TRY_EVERY == 0 and self.fit.num_batches:
            options["second_within"] = min(self.fit.error, MOST_BEHIND)
        return options

    def take(self, plan: RankPlan, planner: int, plans: Sequence[bytes] | None) -> None:
        """A batch begins; ``plans`` are those of all ranks, on the rank that planned it."""
        self._num_taken += 1
        is_due = self._num_taken <= FIRST or self._num_taken % EVERY == 0
        if not (is_due or "tried_as_second" in plan.stats.notes):
            return
        self._given[plan.fingerprint] = planner, plan.stats.simulated
        if plans is not None:
            self._open[plan.fingerprint] = _Batch(plans)
        for held in (self._given, self._open):
            while len(held) > OPEN_BATCHES:
                held.popitem(last=False)

    def turn(self) -> None:
        """The next batch is asked for: hand in what is over, and learn from what has come."""
        self._asked.append(perf_counter())
        with suppress(RuntimeError):  # the store is gone: whoever takes the next batch will hear
            self._hand_in()
            self._collect()

    # ------------------------------------------------------------------ every rank

    def _hand_in(self) -> None:
        over = self._over()
        by_planner: dict[int, list[PassFigures]] = {}
        for fingerprint, group in groupby(figures_of_passes(over), key=lambda f: f.fingerprint):
            figures = list(group)
            if fingerprint in self._given:
                planner, simulated = self._given[fingerprint]
                by_planner.setdefault(planner, []).extend(figures)
                self.predicted_over_measured = _ratio(simulated, figures, self._num_layers)
                self.attention_wait_share = _waited(figures)
        mine = self._exchange.plan_ranks[self._exchange.rank]
        if self._exchange.plan_ranks.index(mine) != self._exchange.rank:
            return  # another rank has the same plan, and hands in the like
        for planner, of in by_planner.items():
            if planner == self._exchange.rank:
                self._hear(mine, of)
            else:
                number = self._num_sent[planner] = self._num_sent.get(planner, -1) + 1
                self._exchange.hand(planner, number, _to_bytes(of))

    def _over(self) -> list[PassTimes]:
        """Passes of batches that are over, taken from those that are held."""
        count = next((n for n, each in enumerate(self._times) if not each.is_over), None)
        if count is None:
            count = len(self._times)
        else:  # the device is in the middle of a batch, of which passes wait for the rest
            current = self._times[count].fingerprint
            while count and self._times[count - 1].fingerprint == current:
                count -= 1
        return [self._times.popleft() for _ in range(count)]

    # ------------------------------------------------------------------ planning ranks

    def _collect(self) -> None:
        for rank, plan_rank in enumerate(self._exchange.plan_ranks):
            while rank != self._exchange.rank and self._open:
                message = self._exchange.handed(rank, self._num_heard[rank])
                if message is None:
                    break
                self._num_heard[rank] += 1
                self._hear(plan_rank, _from_bytes(message))
        ranks = set(self._exchange.plan_ranks)
        for fingerprint in [
            key for key, batch in self._open.items() if set(batch.figures) == ranks
        ]:
            self._fitting.append(self._thread.submit(self._learn, self._open.pop(fingerprint)))
        while self._fitting and self._fitting[0].done():
            self._fitting.popleft().result()

    def _learn(self, batch: _Batch) -> None:
        plans = [RankPlan.from_bytes(plan) for plan in batch.plans]
        self.fit.observe(plans, batch.figures)

    def _hear(self, plan_rank: int, figures: list[PassFigures]) -> None:
        for each in figures:
            if each.fingerprint in self._open:
                self._open[each.fingerprint].figures.setdefault(plan_rank, []).append(each)


def _ratio(
    simulated: dict[str, float], figures: Sequence[PassFigures], num_layers: float
) -> float | None:
    """Predicted over measured seconds of all passes of a batch."""
    predicted = measured = 0.0
    for each in figures:
        name = "backward_seconds" if each.backward else "forward_seconds"
        predicted += simulated[name] / num_layers * each.num_passes
        measured += each.seconds * each.num_passes
    return predicted / measured if measured > 0 else None


def _waited(figures: Sequence[PassFigures]) -> float | None:
    """Part of the seconds of a batch's passes in which the rank waited for messages."""
    seconds = sum(each.seconds * each.num_passes for each in figures)
    waited = sum(part[2] * each.num_passes for each in figures for part in each.transfers)
    return min(waited / seconds, 1.0) if seconds > 0 else None


def _to_bytes(figures: Sequence[PassFigures]) -> bytes:
    return wire.pack(_KIND, {"figures": [asdict(each) for each in figures]}, {})


def _from_bytes(message: bytes) -> list[PassFigures]:
    meta, _ = wire.unpack(_KIND, message)
    with wire.reading(_KIND):
        return [wire.record(PassFigures, each) for each in meta["figures"]]


# --------------------------------------------------------------------------- links


def probe_links(group: dist.ProcessGroup, cluster: Cluster) -> dict[str, list[tuple[int, float]]]:
    """(bytes, seconds) of messages both ways between two ranks of a node, and of two nodes.

    Collective; the same on all ranks. Nobody else sends meanwhile.
    """
    node = cluster.node_of_rank
    pairs = {"near": (0, 1), "far": (0, int((node != node[0]).argmax()))}
    rank = dist.get_rank(group)
    found: dict[str, list[tuple[int, float]]] = {"near": [], "far": []}
    on_gpu = "nccl" in dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    for where, pair in pairs.items():
        both = len(node) > 1 and (node[pair[0]] == node[pair[1]]) == (where == "near")
        if not both or pair[0] == pair[1]:
            continue
        seconds = torch.zeros(len(PROBE_BYTES), dtype=torch.float64, device=device)
        if rank in pair:
            other = pair[1 - pair.index(rank)]
            seconds += torch.tensor(
                [_trip(group, other, size, device) for size in PROBE_BYTES], device=device
            )
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
        found[where] = list(zip(PROBE_BYTES, seconds.tolist(), strict=True))
    return found


def _trip(group: dist.ProcessGroup, other: int, size: int, device: torch.device) -> float:
    """Seconds of a message each way, the median of three after one that opens the link."""
    times = []
    for _ in range(4):
        sent, received = torch.zeros((2, size), dtype=torch.uint8, device=device)
        began = perf_counter()
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(kind, message, group=group, group_peer=other)
                for kind, message in ((dist.irecv, received), (dist.isend, sent))
            ]
        )
        for work in works:
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    return sorted(times[1:])[1]
