"""Placements: which rank owns each data block and which rank runs each compute block.

A strategy is a function ``(batch, spec, cluster, *, block_size=None) -> Placement``; a searching
one takes ``seed`` and ``goal``, too. The next one is a new file here and a line in
``_STRATEGIES``. A strategy that cannot serve a case raises :class:`StrategyError` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable
from dcp.checks import one_of
from dcp.cluster import Cluster


class StrategyError(ValueError):
    """A strategy cannot serve this batch, head count or cluster; the message says why."""


@dataclass(frozen=True)
class Route:
    """The hops that pieces make where a strategy fixes them: int64 arrays of equal length.

    ``piece`` (``block * num_kv_groups + kv group``, of queries ``block * num_head_groups + group``)
    travels from ``source``, which owns it or received it in an earlier step, to ``target`` in
    communication ``step``.
    """

    piece: np.ndarray
    source: np.ndarray
    target: np.ndarray
    step: np.ndarray


@dataclass
class Placement:
    """The two maps over the blocks of one batch, and what a strategy fixes of the schedule.

    Attributes:
        blocks: the blocks that are placed.
        owner: rank that holds each data block's tokens, int64 ``[num_blocks]``.
        rank: by mask name, rank of each compute block (``tile * num_head_groups + group``), int64.
        division: by mask name, division of each compute block where the strategy fixes it;
            otherwise the schedule chooses.
        num_divisions: divisions the strategy wants, or None to let the schedule choose.
        kv_route: the way of every KV piece where the strategy fixes it (a ring); otherwise a rank
            fetches what it needs, from the owner or from a rank of its node that fetches it too.
        q_route: the same of every Q piece.
        results_together: all partial outputs go home in one exchange after the last division,
            instead of each in the step after it was made.
        gradients_travel: partial key and value gradients are summed from rank to rank along the
            order of divisions (a ring's way) instead of each being sent to the owner.
        gradient_lane: lane of each rank, int64 ``[num_ranks]``: travelling gradients are summed
            along each lane apart (the columns of a grid); None: all ranks are one lane.
        notes: what was chosen and why, for ``Plan.stats``.
    """

    blocks: BlockTable
    owner: np.ndarray
    rank: dict[str, np.ndarray]
    division: dict[str, np.ndarray] | None = None
    num_divisions: int | None = None
    kv_route: Route | None = None
    q_route: Route | None = None
    results_together: bool = False
    gradients_travel: bool = False
    gradient_lane: np.ndarray | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a search is after: a layer of a model that is soon over, on ranks that it fits.

    Attributes:
        model_width: of the linear layers, as in :func:`dcp.cost.linear_seconds`.
        tolerance: load that the busiest rank may have beyond the mean, uncharged: more of it buys
            less volume; None: as much as it pays.
        token_limit: tokens of the fullest rank over the mean's.
        variant: which of its ways a search goes: each weighs what is uncertain otherwise.
    """

    model_width: int | None = None
    tolerance: float | None = None
    token_limit: float = 1.25
    variant: int = 0


@dataclass(frozen=True)
class Strategy:
    """A named rule that makes placements: one line of the registry below.

    Attributes:
        name: what it is asked for by, and its function's name.
        family: the file of this folder that holds it and its like.
        searching: whether it searches: it then takes ``seed`` and ``goal`` and spends the
            planner's time budget. Otherwise it is a fixed rule, cheap to place.
        even: whether it deals tokens out evenly, whatever their attention.
        divisions: how many divisions are worth trying, in this order, where the placement leaves
            that open; the planner stops after two in a row that are no better.
    """

    name: str
    family: str
    searching: bool = False
    even: bool = True
    divisions: tuple[int, ...] = (2, 4)

    @property
    def place(self) -> Callable[..., Placement]:
        """The function that places; its file is imported on first use."""
        function: Callable[..., Placement] = getattr(self._module, self.name)
        return function

    def __call__(
        self,
        batch: SequenceBatch,
        spec: AttentionSpec,
        cluster: Cluster,
        *,
        block_size: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Placement:
        """Place a batch. ``block_size``: most tokens of a data block, None lets the rule choose.

        Raises :class:`StrategyError` where the rule cannot serve the case.
        """
        if self.searching:
            options["seed"] = seed
        return self.place(batch, spec, cluster, block_size=block_size, **options)

    def floor_seconds(self, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
        """Forward + backward seconds that its family says it cannot beat; 0 if unknown."""
        floor = getattr(self._module, "floor_seconds", None)
        return float(floor(self.name, batch, spec, cluster)) if floor else 0.0

    @property
    def _module(self) -> ModuleType:
        return import_module(f"dcp.placement.{self.family}")


_MANY = (2, 3, 4, 6, 10, 16, 24)

# In the order in which "auto" tries them: the searching ones by their cost; then the fixed rules,
# only where their floor leaves them a chance, so that auto is never worse than any of them.
_STRATEGIES = (
    Strategy("bisection", "bisection", searching=True, even=False, divisions=_MANY),
    Strategy("hypergraph", "hypergraph", searching=True, even=False, divisions=_MANY),
    Strategy("data_parallel", "data_parallel", even=False),
    Strategy("flexible_groups", "groups", even=False),
    Strategy("groups", "groups", even=False),
    Strategy("data_centric", "groups", even=False),
    Strategy("bucketed", "data_parallel", even=False),
    Strategy("zigzag", "ring"),
    Strategy("a2a_p2p", "heads"),
    Strategy("usp", "heads"),
    Strategy("double_ring", "heads"),
    Strategy("ulysses", "heads"),
    Strategy("allgather", "allgather"),
    Strategy("magi", "magi"),
    Strategy("ring", "ring"),
)
_BY_NAME = {strategy.name: strategy for strategy in _STRATEGIES}


def strategies() -> tuple[Strategy, ...]:
    """Every strategy, in the order in which ``auto`` tries them."""
    return _STRATEGIES


def strategies_for_many() -> tuple[Strategy, ...]:
    """Those of :func:`strategies` whose cost hardly grows with the number of sequences, in the
    order in which ``auto`` tries them for thousands of sequences."""
    return _BY_NAME["data_parallel"], _BY_NAME["bisection"]


def strategy_names() -> list[str]:
    """Names of :func:`strategies`, in the same order."""
    return list(_BY_NAME)


def get_strategy(name: str) -> Strategy:
    """The strategy called ``name``. Raises ``ValueError`` that lists all names for any other."""
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    one_of("strategy", name, ["auto", *_BY_NAME])
    raise ValueError("'auto' chooses among strategies and is none: give it to dcp.plan")


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """As :meth:`Strategy.floor_seconds`, of the strategy called ``name``."""
    return get_strategy(name).floor_seconds(batch, spec, cluster)
