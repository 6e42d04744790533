"""What ``auto`` chooses from: strategies tried in turn, and why some are not planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from dcp import layer
from dcp.batch import AttentionSpec, SequenceBatch
from dcp.checks import TooMany
from dcp.cluster import Cluster
from dcp.cost import attention_seconds, linear_seconds
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

MANY_SEQUENCES = 2_000  # beyond which few strategies are tried: whole sequences even out alone
WORTH = 1.001  # least gain, of a batch of many sequences, that another strategy is planned for
MOST_HOPS = 20_000_000  # sequences x ranks² beyond which rules that cut all sequences are skipped
SEARCH_SECONDS = {  # of a candidate: fixed, per tile, per pair of ranks
    "bisection": (0.06, 4e-5, 2e-6),
    "hypergraph": (0.1, 1e-4, 2e-6),
}
MOST_VARIANTS = 16  # of each search


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Plans of one model on one cluster, by every strategy or a named one.

    Attributes: the arguments of :class:`dcp.planner.Planner`, checked; ``block_size`` None: auto.
    """

    spec: AttentionSpec
    cluster: Cluster
    strategy: str = "auto"
    block_size: int | None = None
    num_divisions: int | None = None
    seed: int = 0
    time_budget: float = 0.25
    second_within: float = 0.0
    max_rank_tokens: int | None = None
    goal: Goal = field(default_factory=Goal)

    def best(self, batch: SequenceBatch) -> Plan:
        """The plan whose layer is predicted fastest, with all its predicted times.

        Raises :class:`StrategyError` where no strategy, or not the named one, can serve the batch.
        """
        ranks, most = self.cluster.num_ranks, self.max_rank_tokens
        if most is not None and batch.num_tokens > ranks * most:
            raise StrategyError(
                f"{ranks} ranks of max_rank_tokens = {most:,} cannot hold {batch.num_tokens:,} "
                "tokens: raise it, or plan for more ranks"
            )
        if self.strategy != "auto":
            strategy = get_strategy(self.strategy)
            placement = self._place(strategy, batch)
            return self._timed(min(self._scheduled(strategy, placement), key=_by_layer))
        tried: dict[str, float | str] = {}
        found: list[Plan] = []  # the best and the second best so far
        spent = 0.0
        for strategy, variant in _in_turn(batch):
            name = f"{strategy.name} {variant}" if variant else strategy.name
            try:
                if found:
                    spent += self._need(strategy, variant, batch, found[0], spent)
                placement = self._place(strategy, batch, variant)
                if found:
                    self._need_chance(self._placed_floor(placement), found[0])
            except (_Skipped, StrategyError, TooMany) as error:
                if not variant:
                    tried[name] = str(error)
                continue
            candidate = min(self._scheduled(strategy, placement), key=_by_layer)
            tried[name] = candidate.stats.layer_seconds
            found = sorted([*found, candidate], key=_by_layer)[:2]
        if not found:
            raise StrategyError("; ".join(dict.fromkeys(map(str, tried.values()))))
        chosen = found[-1] if self._is_near(found) else found[0]
        if chosen is not found[0]:
            chosen.stats.notes["tried_as_second"] = True
        chosen.stats.notes["candidates"] = tried
        return self._timed(chosen)

    def _is_near(self, found: list[Plan]) -> bool:
        """Whether there is a second best that is to be tried, and differs."""
        best, second = found[0], found[-1]
        behind = second.stats.layer_seconds / max(best.stats.layer_seconds, 1e-30) - 1
        return behind < self.second_within and second.fingerprint != best.fingerprint

    def _timed(self, plan: Plan) -> Plan:
        plan.stats.simulated = plan.simulate().to_json()
        times = layer.layer_times(plan, self.cluster, model_width=self.goal.model_width)
        plan.stats.layer_seconds, plan.stats.limit_seconds = times.seconds, times.limit
        plan.stats.layer_excess = times.excess
        return plan

    # ------------------------------------------------------------------ one strategy

    def _place(self, strategy: Strategy, batch: SequenceBatch, variant: int = 0) -> Placement:
        options = {"goal": self._goal(batch, variant)} if strategy.searching else {}
        placement = strategy(
            batch, self.spec, self.cluster, block_size=self.block_size, seed=self.seed, **options
        )
        if self.max_rank_tokens is not None:
            most = int(_rank_tokens(placement, self.cluster).max(initial=0))
            if most > self.max_rank_tokens:
                raise StrategyError(
                    f"{strategy.name} gives a rank {most:,} of {batch.num_tokens:,} tokens, more "
                    f"than max_rank_tokens = {self.max_rank_tokens:,}: raise it, or plan for more "
                    "ranks"
                )
        return placement

    def _goal(self, batch: SequenceBatch, variant: int) -> Goal:
        limit = self.goal.token_limit
        if self.max_rank_tokens is not None and batch.num_tokens:
            mean = batch.num_tokens / self.cluster.num_ranks
            limit = min(limit, max(self.max_rank_tokens / mean, 1.0))
        return replace(self.goal, variant=variant, token_limit=limit)

    def _scheduled(self, strategy: Strategy, placement: Placement) -> Iterator[Plan]:
        """One strategy's placement with every number of divisions worth trying."""
        fixed = self.num_divisions or placement.num_divisions
        best, no_better, at = np.inf, 0, 1
        for count in (fixed,) if fixed else strategy.divisions:
            plan = self._compiled(strategy, placement, count, tail=True)
            yield plan
            seconds = plan.stats.layer_seconds
            no_better = 0 if seconds < best else no_better + 1
            if seconds < best:
                best, at = seconds, count
            if no_better == 2 or plan.stats.num_divisions < count:  # or: nothing moves at all
                break
        if at > 2 and placement.division is None:
            yield self._compiled(strategy, placement, at, tail=False)

    def _compiled(
        self, strategy: Strategy, placement: Placement, count: int, *, tail: bool
    ) -> Plan:
        plan = Plan.from_placement(
            placement, self.cluster, strategy=strategy.name, num_divisions=count, tail=tail
        )
        plan.stats.layer_seconds = layer.layer_seconds(
            plan, self.cluster, model_width=self.goal.model_width
        )
        return plan

    # ------------------------------------------------------------------ what is not worth planning

    def _need(
        self, strategy: Strategy, variant: int, batch: SequenceBatch, best: Plan, spent: float
    ) -> float:
        """Skip what cannot, or hardly, be faster, or takes too long to plan.

        Returns what planning it is expected to take of the time budget, in seconds.
        """
        if len(batch.seqlens) > MANY_SEQUENCES:
            _need_gain(best)
            return 0.0
        if strategy.searching:
            _need_gain(best)
        if variant and best.stats.max_rank_recv_bytes == 0:
            raise _Skipped("nothing moves already")
        self._need_chance(self._floor(strategy, batch), best)
        hops = len(batch.seqlens) * self.cluster.num_ranks**2
        if not strategy.searching and hops > MOST_HOPS:
            raise _Skipped(f"{hops:.1e} transfers are too many to plan in time")
        if not strategy.searching:
            return 0.0
        expected = _expected_seconds(strategy.name, best)
        if spent + expected > self.time_budget:
            raise _Skipped("beyond the time budget")
        return expected

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
        return linear_seconds(tokens, self.spec, self.cluster, model_width=self.goal.model_width)

    def _placed_floor(self, placement: Placement) -> float:
        """Seconds of a layer that a placement cannot beat: what its busiest rank has to do."""
        blocks, ranks = placement.blocks, self.cluster.num_ranks
        per_token = sum(blocks.batch.weights.values()) * self._linear_seconds(1.0)
        load = _rank_tokens(placement, self.cluster) * per_token
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


class _Skipped(Exception):
    """A candidate is not planned; the message says why."""


def _need_gain(best: Plan) -> None:
    """Skip what could gain next to nothing: no bytes move and all ranks have the same to do."""
    stats = best.stats
    uneven = max(stats.compute_balance, stats.token_balance)
    if stats.max_rank_recv_bytes == 0 and uneven <= WORTH:
        raise _Skipped(f"nothing moves, and ranks differ by less than {WORTH - 1:.1%}")


def _by_layer(plan: Plan) -> float:
    return plan.stats.layer_seconds


def _rank_tokens(placement: Placement, cluster: Cluster) -> np.ndarray:
    """Tokens that each rank holds: float ``[num_ranks]``."""
    return np.bincount(
        placement.owner, weights=placement.blocks.length, minlength=cluster.num_ranks
    )


def _in_turn(batch: SequenceBatch) -> Iterator[tuple[Strategy, int]]:
    """What ``auto`` tries, in this order: every strategy once, then searches that go other ways."""
    many = len(batch.seqlens) > MANY_SEQUENCES
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
