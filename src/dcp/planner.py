"""Batch -> plan: build candidates, keep the best prediction, remember what was planned."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Timer
from time import perf_counter
from typing import Any

import numpy as np

from dcp import layer
from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import check_blocks
from dcp.checks import TooMany, number, positive, whole
from dcp.cluster import Cluster
from dcp.cost import attention_seconds, linear_seconds
from dcp.events import play
from dcp.placement import (
    Goal,
    Placement,
    Strategy,
    StrategyError,
    get_strategy,
    strategies,
    strategies_for_many,
)
from dcp.plans import Plan
from dcp.schedule import MOST_DIVISIONS

MOST_SEED = 2**31 - 1  # what the partitioner takes
MANY_SEQUENCES = 2_000  # beyond which few strategies are tried: whole sequences even out alone
WORTH = 1.001  # least gain, of a batch of many sequences, that another strategy is planned for
MOST_HOPS = 20_000_000  # sequences x ranks² beyond which rules that cut all sequences are skipped
COMPILING = (  # said after so many seconds, where nothing is compiled yet
    2.0, "dcp: compiling the planner for this machine, once; this takes about half a minute",
)  # fmt: skip
SEARCH_SECONDS = {  # of a candidate: fixed, per tile, per pair of ranks
    "bisection": (0.06, 4e-5, 2e-6),
    "hypergraph": (0.1, 1e-4, 2e-6),
}
MOST_VARIANTS = 16  # of each search


class Planner:
    """Plans batches of one model on one cluster, and remembers the plans it made.

    A plan depends only on the multiset of (length, mask) of the batch, so that a batch seen before
    in any order costs nothing.

    Args:
        strategy: a name of :func:`dcp.placement.strategy_names`, or ``"auto"``: several are
            planned and the one with the least :func:`layer_seconds` is kept.
        block_size: most tokens of a data block, or ``"auto"``.
        num_divisions: divisions of the schedule, or None: chosen by prediction.
        tolerance: load (attention and linear layers) that the planned strategies may leave the
            busiest rank beyond the mean, 0.03 being 3%; None: what pays in seconds.
        seed: the same inputs and seed give the same plan.
        time_budget: seconds on one core that ``"auto"`` may spend on candidates beyond the first;
            held against an estimate, not a clock, so that equal budgets give equal plans on any
            machine. More of it is spent on searches that go other ways.
        token_limit: tokens of the fullest rank over the mean's that searches keep to: memory.
        second_within: take the second best of ``"auto"``'s candidates if it is predicted no further
            behind the best than that, 0.03 being 3%, so that its prediction can be tried; 0: never.
        model_width: hidden size of the model, for the cost of its linear layers; None: that of an
            8 B model, or the heads' own if they are wider; 0: attention alone decides.
        cache_size: plans remembered, the least recently used are forgotten first.

    Raises ``ValueError`` for an unknown strategy or a size below 1.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        cluster: Cluster,
        *,
        strategy: str = "auto",
        block_size: int | str = "auto",
        num_divisions: int | None = None,
        tolerance: float | None = None,
        seed: int = 0,
        time_budget: float = 0.25,
        token_limit: float = 1.25,
        second_within: float = 0.0,
        model_width: int | None = None,
        cache_size: int = 64,
    ) -> None:
        if not isinstance(spec, AttentionSpec) or not isinstance(cluster, Cluster):
            raise ValueError(
                f"spec and cluster must be a dcp.AttentionSpec and a dcp.Cluster, got a "
                f"{type(spec).__name__} and a {type(cluster).__name__}"
            )
        if strategy != "auto":
            get_strategy(strategy)
        self.spec, self.cluster = spec, cluster
        self.strategy, self.seed = strategy, whole("seed", seed, most=MOST_SEED)
        self.time_budget = number("time_budget", time_budget)
        self.second_within = number("second_within", second_within)
        tolerance = None if tolerance is None else positive("tolerance", tolerance)
        token_limit = number("token_limit", token_limit)
        if token_limit < 1:
            raise ValueError(
                f"token_limit must be 1 or more, the fullest rank's tokens over the mean's, got "
                f"{token_limit}"
            )
        self.block_size = _block_size(block_size)
        self.num_divisions = num_divisions
        if num_divisions is not None:
            self.num_divisions = whole("num_divisions", num_divisions, least=1, most=MOST_DIVISIONS)
        self.model_width = None if model_width is None else whole("model_width", model_width)
        self.goal = Goal(model_width=self.model_width, tolerance=tolerance, token_limit=token_limit)
        self.cache_size = whole("cache_size", cache_size)
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()

    def plan(self, batch: SequenceBatch) -> Plan:
        """Owners, compute ranks, divisions and programs for one batch.

        Raises :class:`~dcp.placement.StrategyError` if the named strategy cannot serve it.
        """
        if not isinstance(batch, SequenceBatch):
            raise ValueError(
                f"the batch is a {type(batch).__name__}: give a dcp.SequenceBatch, such as "
                "SequenceBatch(seqlens, masks)"
            )
        if batch.cached.any():
            raise ValueError("the batch has cached tokens: plan it with dcp.inference.plan_turn")
        _load_compiled()
        started = perf_counter()
        order, key = _canonical(batch)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._best(batch.reordered(order))
            self._plans[key] = plan
            while len(self._plans) > self.cache_size:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        seconds = perf_counter() - started
        return _relabelled(plan, batch, order, seconds)

    def _best(self, batch: SequenceBatch) -> Plan:
        if self.block_size is not None:
            check_blocks(int((-(-batch.seqlens // self.block_size)).sum()))
        if self.strategy != "auto":
            strategy = get_strategy(self.strategy)
            placement = self._place(strategy, batch)
            return self._timed(min(self._candidates(strategy, placement), key=_by_layer))
        tried: dict[str, float | str] = {}
        best: Plan | None = None
        second: Plan | None = None
        spent = 0.0
        many = len(batch.seqlens) > MANY_SEQUENCES
        for strategy, variant in _in_turn(many):
            name = f"{strategy.name} {variant}" if variant else strategy.name
            try:
                if best is not None and many:
                    _need_gain(best)
                elif best is not None:
                    if strategy.searching and best.stats.max_rank_recv_bytes == 0:
                        raise _Skipped("nothing moves already")
                    self._need_chance(self._floor(strategy, batch), best)
                    _need_size(strategy, batch, self.cluster)
                    if strategy.searching:
                        expected = _expected_seconds(strategy.name, best)
                        if spent + expected > self.time_budget:
                            raise _Skipped("beyond the time budget")
                        spent += expected
                placement = self._place(strategy, batch, variant)
                if best is not None:
                    self._need_chance(self._placed_floor(placement), best)
            except (_Skipped, StrategyError, TooMany) as error:
                if not variant:
                    tried[name] = str(error)
                continue
            candidate = min(self._candidates(strategy, placement), key=_by_layer)
            tried[name] = candidate.stats.layer_seconds
            if best is None or candidate.stats.layer_seconds < best.stats.layer_seconds:
                best, second = candidate, best
            elif second is None or candidate.stats.layer_seconds < second.stats.layer_seconds:
                second = candidate
        if best is None:
            raise StrategyError("; ".join(dict.fromkeys(map(str, tried.values()))))
        if second is not None and self._is_near(second, best):
            best = second
            best.stats.notes["tried_as_second"] = True
        best.stats.notes["candidates"] = tried
        return self._timed(best)

    def _is_near(self, second: Plan, best: Plan) -> bool:
        """Whether the second best is to be tried, and differs."""
        behind = second.stats.layer_seconds / best.stats.layer_seconds - 1
        return behind < self.second_within and second.fingerprint != best.fingerprint

    def _timed(self, plan: Plan) -> Plan:
        """The chosen plan, with all its predicted times."""
        plan.stats.simulated = plan.simulate().to_json()
        times = layer.layer_times(plan, self.cluster, model_width=self.model_width)
        plan.stats.layer_seconds, plan.stats.limit_seconds = times.seconds, times.limit
        plan.stats.layer_excess = times.excess
        return plan

    def _floor(self, strategy: Strategy, batch: SequenceBatch) -> float:
        """Seconds of a layer that the strategy cannot beat, if it deals tokens out evenly."""
        fastest = max(float(self.cluster.speed_of_rank.max()), 1.0)
        attention = strategy.floor_seconds(batch, self.spec, self.cluster)
        if not strategy.even:  # a rank of much attention may have few tokens
            return attention / fastest
        tokens = batch.num_tokens / self.cluster.num_ranks
        linear = sum(batch.weights.values()) * self._linear_seconds(tokens)
        return (attention + linear) / fastest

    def _linear_seconds(self, tokens: float) -> float:
        return linear_seconds(tokens, self.spec, self.cluster, model_width=self.model_width)

    def _placed_floor(self, placement: Placement) -> float:
        """Seconds of a layer that a placement cannot beat: what its busiest rank has to do."""
        blocks, ranks = placement.blocks, self.cluster.num_ranks
        tokens = np.bincount(placement.owner, weights=blocks.length, minlength=ranks)
        load = tokens * (sum(blocks.batch.weights.values()) * self._linear_seconds(1.0))
        for name, weight in blocks.batch.weights.items():
            area = np.repeat(blocks.masks[name].area, blocks.num_head_groups)
            work = np.bincount(placement.rank[name], weights=area, minlength=ranks)
            for backward in (False, True):
                seconds = attention_seconds(work, self.spec, self.cluster, backward=backward)
                load = load + weight * seconds / blocks.num_head_groups
        return float((load / self.cluster.speed_of_rank).max())

    @staticmethod
    def _need_chance(floor: float, best: Plan) -> None:
        if floor >= best.stats.layer_seconds:
            raise _Skipped(f"cannot be faster than {floor:.2e} s")

    def _place(self, strategy: Strategy, batch: SequenceBatch, variant: int = 0) -> Placement:
        options = {"goal": replace(self.goal, variant=variant)} if strategy.searching else {}
        return strategy(
            batch, self.spec, self.cluster, block_size=self.block_size, seed=self.seed, **options
        )

    def _candidates(self, strategy: Strategy, placement: Placement) -> Iterator[Plan]:
        """One strategy's placement with every number of divisions worth trying."""
        fixed = self.num_divisions or placement.num_divisions
        best, no_better, at = np.inf, 0, 1
        for count in (fixed,) if fixed else strategy.divisions:
            plan = self._scheduled(strategy, placement, count, tail=True)
            yield plan
            seconds = plan.stats.layer_seconds
            no_better = 0 if seconds < best else no_better + 1
            if seconds < best:
                best, at = seconds, count
            if no_better == 2 or plan.stats.num_divisions < count:  # or: nothing moves at all
                break
        if at > 2 and placement.division is None:
            yield self._scheduled(strategy, placement, at, tail=False)

    def _scheduled(
        self, strategy: Strategy, placement: Placement, count: int, *, tail: bool
    ) -> Plan:
        plan = Plan.from_placement(
            placement, self.cluster, strategy=strategy.name, num_divisions=count, tail=tail
        )
        plan.stats.layer_seconds = layer_seconds(plan, model_width=self.model_width)
        return plan


class _Skipped(Exception):
    """A candidate is not planned; the message says why."""


def _need_gain(best: Plan) -> None:
    """Skip what could gain next to nothing: no bytes move and all ranks have the same to do."""
    stats = best.stats
    uneven = max(stats.compute_balance, stats.token_balance)
    if stats.max_rank_recv_bytes == 0 and uneven <= WORTH:
        raise _Skipped(f"nothing moves, and ranks differ by less than {WORTH - 1:.1%}")


def _need_size(strategy: Strategy, batch: SequenceBatch, cluster: Cluster) -> None:
    """Skip rules that would cut every sequence over more ranks than can be planned in time."""
    hops = len(batch.seqlens) * cluster.num_ranks**2
    if not strategy.searching and hops > MOST_HOPS:
        raise _Skipped(f"{hops:.1e} transfers are too many to plan in time")


def plan(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    strategy: str = "auto",
    block_size: int | str = "auto",
    num_divisions: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    time_budget: float = 0.25,
    second_within: float = 0.0,
    model_width: int | None = None,
) -> Plan:
    """Plan one batch: see :class:`Planner`, which also remembers plans."""
    planner = Planner(
        spec,
        cluster,
        strategy=strategy,
        block_size=block_size,
        num_divisions=num_divisions,
        tolerance=tolerance,
        seed=seed,
        time_budget=time_budget,
        second_within=second_within,
        model_width=model_width,
    )
    return planner.plan(batch)


def _block_size(given: int | str) -> int | None:
    if isinstance(given, str) and given == "auto":
        return None
    try:
        return whole("block_size", given, least=1)
    except ValueError as error:
        raise ValueError(f"{error}; or give 'auto'") from None


@cache
def _load_compiled() -> None:
    """Load (the first time ever: compile) the compiled parts, so that no plan is charged for it."""
    said = Timer(COMPILING[0], print, [COMPILING[1]], {"file": sys.stderr})
    if not any(Path(str(play.stats.cache_path)).glob("events.play-*.nbi")):
        said.start()
    try:
        _plan_a_little()
    finally:
        said.cancel()


def _plan_a_little() -> None:
    batch = SequenceBatch([40, 9, 1], "causal")
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8)
    cluster = Cluster(num_nodes=2, devices_per_node=2)
    placement = get_strategy("bisection")(batch, spec, cluster)
    Plan.from_placement(placement, cluster, strategy="bisection").simulate()


def _by_layer(plan: Plan) -> float:
    return plan.stats.layer_seconds


def layer_seconds(plan: Plan, *, model_width: int | None = None) -> float:
    """Forward + backward seconds of a layer: see :func:`dcp.layer.layer_seconds`."""
    return layer.layer_seconds(plan, plan.cluster, model_width=model_width)


def _in_turn(many: bool) -> Iterator[tuple[Strategy, int]]:
    """What ``auto`` tries, in this order: every strategy once, then searches that go other ways."""
    once = strategies_for_many() if many else strategies()
    yield from ((strategy, 0) for strategy in once)
    if not many:
        searching = [strategy for strategy in once if strategy.searching]
        yield from ((s, variant) for variant in range(1, MOST_VARIANTS) for s in searching)


def _expected_seconds(name: str, so_far: Plan) -> float:
    """What one more search would cost to plan, by the size of the best plan so far."""
    fixed, per_tile, per_pair = SEARCH_SECONDS[name]
    pairs = so_far.num_ranks**2
    return fixed + per_tile * so_far.stats.num_compute_blocks + per_pair * pairs


def _canonical(batch: SequenceBatch) -> tuple[np.ndarray, tuple[Any, ...]]:
    """An order of the sequences that depends on (length, mask) alone, and the batch's identity."""
    masks = [
        [mask.bands.tobytes() for mask in per_sequence] for per_sequence in batch.masks.values()
    ]
    described = list(zip(batch.seqlens.tolist(), *masks, strict=True))
    order = sorted(range(len(described)), key=described.__getitem__, reverse=True)
    key = (tuple(batch.weights.items()), tuple(described[index] for index in order))
    return np.array(order, dtype=np.int64), key


def _relabelled(plan: Plan, batch: SequenceBatch, order: np.ndarray, seconds: float) -> Plan:
    """The plan of the reordered batch, told in the numbers of ``batch``."""
    sequence = order[plan.block_sequence] if len(order) else plan.block_sequence
    return replace(
        plan,
        seqlens=batch.seqlens,
        block_sequence=sequence,
        block_offset=batch.offsets[sequence] + plan.block_position,
        stats=replace(deepcopy(plan.stats), planning_seconds=seconds),
    )
