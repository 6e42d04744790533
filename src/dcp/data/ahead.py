"""Planning ahead by several ranks: who plans which batch, and who takes over when a pool is lost.

Every iteration belongs to one planning rank, by a rule that all ranks know. A planning rank plans
its next iterations while training runs and leaves the others their shares. A lost pool's notice
travels in place of a share, so all ranks learn of it at the same iteration and go on by the same
rule: nobody has to agree on anything.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace

from dcp.data.batching import PlacedBatch
from dcp.data.exchange import ERROR_SECONDS, Exchange, Share, error_to_bytes
from dcp.data.messages import PlanningError, PoolLost
from dcp.data.pool import Pool

Prepare = Callable[[PlacedBatch], tuple[Share, bytes]]


class Deal:
    """Which planning rank plans an iteration: they take turns.

    The turns of a rank that lost its pool go round the others; no other turn moves.
    """

    def __init__(self, planners: Sequence[int]) -> None:
        self.planners = tuple(planners)
        self.lost: set[int] = set()

    def planner(self, iteration: int) -> int | None:
        """The rank that plans an iteration; None where no pool is left."""
        number, turn = divmod(iteration, len(self.planners))
        others = self.planners[:turn] + self.planners[turn + 1 :]
        start = number % max(len(others), 1)
        order = (self.planners[turn], *others[start:], *others[:start])
        return next((planner for planner in order if planner not in self.lost), None)


@dataclass(frozen=True)
class Taken:
    """A share in its turn.

    Attributes:
        waited_seconds: how long the caller was held up, with all that planning ahead did in it.
        planned_ahead: batches, this one included, that were planned when it was asked for; None
            on ranks that do not plan.
        planner: the rank that planned it.
        plans: every rank's plan as bytes, on that rank; elsewhere None.
    """

    share: Share
    waited_seconds: float
    planned_ahead: int | None
    planner: int
    plans: Sequence[bytes] | None


class LookAhead:
    """Takes shares in order; on planning ranks, keeps the next ``look_ahead`` of its own planned.

    Flow control: of a planning rank's own batches at most ``2 * look_ahead + 1`` are being planned
    or not yet read by all. Then it plans less far ahead; with nothing planned, it waits.

    Args:
        exchange: the ranks.
        planners: ranks that plan, in turn.
        pool: where this rank plans; None where it does not.
        prepare: gives a batch's share (without plan) and its request. Runs in the caller's thread.
        look_ahead: batches of each planning rank.
        timeout_seconds: how long a rank waits for a plan.
    """

    def __init__(
        self,
        exchange: Exchange,
        planners: Sequence[int],
        pool: Pool | None,
        prepare: Prepare,
        *,
        look_ahead: int,
        timeout_seconds: float,
    ) -> None:
        self._exchange, self._deal, self._pool = exchange, Deal(planners), pool
        self._prepare, self._look_ahead, self._timeout = prepare, look_ahead, timeout_seconds
        self._starts = 0
        self._pending: dict[int, _Planned] = {}

    def start(self, places: Iterator[PlacedBatch] | None) -> None:
        """Begin with the first of ``places`` (None on ranks that do not plan), on all ranks."""
        self.stop()
        self._starts += 1  # tells the shares of this run from stale ones
        self._iteration, self._horizon = 0, 0
        self._source = places
        self._places: dict[int, PlacedBatch] = {}
        self._unread: dict[int, str] = {}  # own iterations that not all have read
        self._early: dict[str, Share | Exception] = {}  # seen before their turn

    def take(self) -> Taken:
        """The next share; :class:`PlanningError` where no pool or no rank makes its plan."""
        began = time.perf_counter()
        iteration = self._iteration
        depth = self._count_planned()
        share: Share | None = None
        own: _Planned | None = None
        while share is None:
            planner = self._deal.planner(iteration)
            if planner is None:
                raise PlanningError("no rank can plan: all have lost their planning pools")
            self._plan_ahead()
            own = self._pending.get(iteration)
            try:
                share = self._share_of(iteration, planner)
            except PoolLost as error:
                self._pass_on(planner, error)
        self._iteration += 1
        self._places.pop(iteration, None)
        assert planner is not None
        plans = own.future.result() if own is not None else None
        return Taken(share, time.perf_counter() - began, depth, planner, plans)

    def upcoming(self, count: int) -> list[Share]:
        """The next shares, ``count`` at most, that are there already; they stay to be taken."""
        shares: list[Share] = []
        with suppress(RuntimeError):  # the store is gone: whoever takes the next share will hear
            for iteration in range(self._iteration, self._iteration + count):
                share = self._glance(iteration)
                if not isinstance(share, Share):
                    break
                shares.append(share)
        return shares

    def stop(self) -> None:
        """Forget what is planned ahead."""
        for planned in self._pending.values():
            planned.withdraw()
        self._pending = {}

    # ------------------------------------------------------------------ one iteration

    def _glance(self, iteration: int) -> Share | Exception | None:
        """The share, or the error in its place, if it is there and its planner well."""
        planner, planned = self._deal.planner(iteration), self._pending.get(iteration)
        key = self._key(iteration, planner)
        if key not in self._early and planner is not None:
            if planner == self._exchange.rank:
                if planned is not None and planned.is_published:
                    self._early[key] = planned.own_share(0.0)
            elif self._exchange.num_published([key]):
                try:
                    self._early[key] = Share.from_bytes(self._exchange.fetch(key, planner))
                except (ValueError, PlanningError) as error:  # for when its turn comes
                    self._early[key] = error
        return self._early.get(key)

    def _share_of(self, iteration: int, planner: int) -> Share:
        key = self._key(iteration, planner)
        early = self._early.pop(key, None)
        if isinstance(early, Exception):
            raise early
        if planner == self._exchange.rank:
            planned = self._pending.pop(iteration)
            try:
                return early or planned.own_share(self._timeout)
            except PlanningError:
                raise
            except Exception:  # the store may go with this rank: the others shall read it first
                with suppress(PlanningError):
                    self._exchange.was_read(self._unread[iteration], wait_seconds=ERROR_SECONDS)
                    del self._unread[iteration]
                raise
        return early or Share.from_bytes(self._exchange.fetch(key, planner))

    def _pass_on(self, planner: int, error: PoolLost) -> None:
        """A pool is lost; the other planning ranks take its iterations over from here on."""
        self._deal.lost.add(planner)
        left = [rank for rank in self._deal.planners if rank not in self._deal.lost]
        if planner == self._exchange.rank:
            self.stop()
        if not left:
            raise PlanningError(f"rank {planner} could not plan, and no other can: {error}")
        if self._exchange.rank == 0:
            ranks = ", ".join(map(str, left))
            warnings.warn(
                f"rank {planner} lost its planning pool ({error}); "
                f"its batches are planned by rank{'s' * (len(left) > 1)} {ranks} from now on",
                RuntimeWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------ planning ranks

    def _plan_ahead(self) -> None:
        """Start planning this rank's iterations of the window."""
        if not self._plans:
            return
        assert self._source is not None
        end = self._iteration + self._look_ahead * len(self._deal.planners) + 1
        while self._horizon < end:
            self._places[self._horizon] = next(self._source)
            self._horizon += 1
        for iteration in range(self._iteration, end):
            mine = self._deal.planner(iteration) == self._exchange.rank
            if mine and iteration not in self._pending:
                if not self._may_plan(iteration):
                    break
                self._plan(iteration)

    def _may_plan(self, iteration: int) -> bool:
        """Flow control; waits for the slowest reader only if this very iteration is wanted."""
        while len(self._unread) > 2 * self._look_ahead:
            oldest = min(self._unread)
            needed = iteration == self._iteration and oldest < iteration
            wait_seconds = self._timeout if needed else 0.0
            if self._exchange.was_read(self._unread[oldest], wait_seconds=wait_seconds):
                del self._unread[oldest]
            else:
                return iteration == self._iteration
        return True

    def _plan(self, iteration: int) -> None:
        assert self._pool is not None
        share = None
        try:
            share, request = self._prepare(self._places[iteration])
            future = self._pool.submit(request)
        except Exception as error:  # raised when its turn comes, here and on every rank
            future = Future()
            future.set_exception(error)
        key = self._key(iteration, self._exchange.rank)
        self._unread[iteration] = key
        self._pending[iteration] = _Planned(self._exchange, key, share, future)

    def _count_planned(self) -> int | None:
        """Batches from the next on that are planned, up to the first that is not."""
        if not self._plans:
            return None
        first, own = self._iteration, self._exchange.rank
        count = max(self._horizon - first, 0)
        planners = [self._deal.planner(first + n) for n in range(count)]
        own_missing = (
            n for n in range(count) if planners[n] == own and not self._is_ready(first + n)
        )
        count = next(own_missing, count)
        keys = {self._key(first + n, planners[n]): n for n in range(count) if planners[n] != own}
        missing = [key for key in keys if key not in self._early]
        there = self._exchange.num_published(missing) if missing else 0
        return count if there == len(missing) else keys[missing[there]]

    def _is_ready(self, iteration: int) -> bool:
        return iteration in self._pending and self._pending[iteration].future.done()

    @property
    def _plans(self) -> bool:
        return self._pool is not None and self._exchange.rank not in self._deal.lost

    def _key(self, iteration: int, planner: int | None) -> str:
        return f"{self._starts}/{iteration}/{planner}"


class _Planned:
    """A batch on its way: the other ranks get their shares as soon as its plan is finished."""

    def __init__(
        self, exchange: Exchange, key: str, share: Share | None, future: Future[list[bytes]]
    ) -> None:
        self._exchange, self._key, self._share, self.future = exchange, key, share, future
        self._lock, self._published, self._withdrawn = threading.Lock(), threading.Event(), False
        self._failure: Exception | None = None
        future.add_done_callback(self._publish)

    @property
    def is_published(self) -> bool:
        """Whether the batch is planned and the others have their shares, all without an error."""
        there = self._published.is_set() and self._failure is None
        return there and self.future.exception() is None

    def own_share(self, timeout: float) -> Share:
        """The planning rank's own share, once the others have theirs."""
        try:
            rank_plans = self.future.result(timeout)
        except TimeoutError:
            raise PlanningError(f"a batch was not planned within {timeout:g} s") from None
        finally:
            if self.future.done():
                self._published.wait(timeout)
        if self._failure is not None:
            raise PlanningError(f"a plan could not be published: {self._failure}")
        assert self._share is not None
        return replace(self._share, plan=rank_plans[self._exchange.plan_ranks[self._exchange.rank]])

    def withdraw(self) -> None:
        """Nobody will ask for this batch."""
        self.future.cancel()
        with self._lock:
            self._withdrawn = True
            if self._published.is_set():
                self._exchange.withdraw(self._key)

    def _publish(self, future: Future[list[bytes]]) -> None:
        """Runs in the pool's thread."""
        if future.cancelled():
            return
        with self._lock:
            try:
                if not self._withdrawn:
                    self._exchange.publish(self._key, self._messages(future))
            except RuntimeError as error:  # the store is gone
                self._failure = error
            self._published.set()

    def _messages(self, future: Future[list[bytes]]) -> list[bytes]:
        """What each rank of the plan gets."""
        if error := future.exception():
            message = error_to_bytes(error, rank=self._exchange.rank)
            return [message] * (max(self._exchange.plan_ranks) + 1)
        assert self._share is not None
        return [replace(self._share, plan=plan).to_bytes() for plan in future.result()]
