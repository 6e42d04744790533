"""Batch -> plan: build candidates, keep the best prediction, remember what was planned."""

from __future__ import annotations

import sys
from collections import OrderedDict
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
from dcp.candidates import Candidates
from dcp.checks import number, positive, whole
from dcp.cluster import Cluster
from dcp.events import play
from dcp.placement import Goal, get_strategy
from dcp.plans import Plan
from dcp.schedule import MOST_DIVISIONS

MOST_SEED = 2**31 - 1  # what the partitioner takes
COMPILING = (  # said after so many seconds, where nothing is compiled yet
    2.0, "dcp: compiling the planner for this machine, once; this takes about half a minute",
)  # fmt: skip


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
        token_limit: tokens of the fullest rank over the mean's that searches keep to.
        max_rank_tokens: tokens that a rank has memory for: no plan gives any rank more, and a batch
            that cannot be dealt out so is refused; None: no limit.
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
        max_rank_tokens: int | None = None,
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
        token_limit = number("token_limit", token_limit)
        if token_limit < 1:
            raise ValueError(
                f"token_limit must be 1 or more, the fullest rank's tokens over the mean's, got "
                f"{token_limit}"
            )
        goal = Goal(
            model_width=None if model_width is None else whole("model_width", model_width),
            tolerance=None if tolerance is None else positive("tolerance", tolerance),
            token_limit=token_limit,
        )
        self._candidates = Candidates(
            spec=spec,
            cluster=cluster,
            strategy=strategy,
            block_size=_block_size(block_size),
            num_divisions=None
            if num_divisions is None
            else whole("num_divisions", num_divisions, least=1, most=MOST_DIVISIONS),
            seed=whole("seed", seed, most=MOST_SEED),
            time_budget=number("time_budget", time_budget),
            second_within=number("second_within", second_within),
            max_rank_tokens=None
            if max_rank_tokens is None
            else whole("max_rank_tokens", max_rank_tokens, least=1),
            goal=goal,
        )
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
            size = self._candidates.block_size
            if size is not None:
                check_blocks(int((-(-batch.seqlens // size)).sum()))
            plan = self._candidates.best(batch.reordered(order))
            self._plans[key] = plan
            while len(self._plans) > self.cache_size:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        seconds = perf_counter() - started
        return _relabelled(plan, batch, order, seconds)


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
    token_limit: float = 1.25,
    max_rank_tokens: int | None = None,
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
        token_limit=token_limit,
        max_rank_tokens=max_rank_tokens,
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


def layer_seconds(plan: Plan, *, model_width: int | None = None) -> float:
    """Forward + backward seconds of a layer: see :func:`dcp.layer.layer_seconds`."""
    return layer.layer_seconds(plan, plan.cluster, model_width=model_width)


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
