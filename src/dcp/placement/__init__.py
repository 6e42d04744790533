"""Placements: which rank owns each data block and which rank runs each compute block.

A strategy is a function ``(batch, spec, cluster, *, block_size=None, seed=0) -> Placement`` (fixed
rules ignore the seed). The next one is a new file here and a line in ``_FAMILIES``. A strategy that
cannot serve a case raises :class:`StrategyError` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable
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


Strategy = Callable[..., Placement]

_FAMILIES = {
    "zigzag": "ring",
    "ring": "ring",
    "allgather": "allgather",
    "ulysses": "ulysses",
    "usp": "grid",
    "double_ring": "grid",
    "a2a_p2p": "grid",
    "data_parallel": "data_parallel",
    "bucketed": "data_parallel",
    "groups": "groups",
    "flexible_groups": "groups",
    "data_centric": "groups",
    "magi": "magi",
    "hypergraph": "hypergraph",
    "bisection": "bisection",
}


def strategy_names() -> list[str]:
    """Every strategy, best-known names first to last as documented."""
    return list(_FAMILIES)


def get_strategy(name: str) -> Strategy:
    """The placement function called ``name``; its file is imported on first use."""
    if name not in _FAMILIES:
        raise ValueError(f"strategy {name!r} is not one of auto, {', '.join(_FAMILIES)}")
    return getattr(import_module(f"dcp.placement.{_FAMILIES[name]}"), name)


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """Forward + backward seconds that the strategy's family says it cannot beat; 0 if unknown."""
    family = import_module(f"dcp.placement.{_FAMILIES[name]}")
    floor = getattr(family, "floor_seconds", None)
    return floor(name, batch, spec, cluster) if floor else 0.0
