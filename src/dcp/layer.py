"""How long a transformer layer takes under a plan, and where that goes.

A training step runs one layer after the other. A rank does its own linear layers, which nobody
else needs, and its share of attention, for which ranks wait for each other, but only where a
message goes from one to the other. So a rank with more tokens may have less attention: it begins
later and has less to do. What a layer costs is the **period**: what one more layer adds to a pass
of many. It is found by playing a few layers one after the other, forward, and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dcp.cluster import Cluster
from dcp.cost import attention_seconds, linear_seconds
from dcp.simulate import Timed, Work, pass_work

NUM_LAYERS = 3  # played; what one layer adds hardly changes after the first
MANY_RANKS = 128  # beyond which one layer is played alone, a little slower than the period


class Whole(Timed, Protocol):
    """What the time of a layer needs of a plan; see :class:`dcp.Plan`."""

    @property
    def rank_tokens(self) -> np.ndarray: ...
    def rank_areas(self, mask: str) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds of a layer, forward and backward, summed over the masks by their weights.

    Attributes:
        seconds: what one more layer takes.
        limit: attention and linear layers dealt out evenly, at full rate: what no plan can beat.
        imbalance: what the busiest rank has to do beyond that, at full rate.
        kernels: what launches and partly filled kernel tiles add to the busiest rank.
        intra_node: what waiting adds where only links inside nodes take time.
        inter_node: what links between nodes add to that.

    The last five sum up to ``seconds``.
    """

    seconds: float
    limit: float
    imbalance: float
    kernels: float
    intra_node: float
    inter_node: float

    @property
    def excess(self) -> dict[str, float]:
        """The parts beyond the limit, by name."""
        names = ("imbalance", "kernels", "intra_node", "inter_node")
        return {name: getattr(self, name) for name in names}


def layer_seconds(
    plan: Whole, cluster: Cluster, *, model_width: int | None = None, gathers: bool = False
) -> float:
    """Forward + backward seconds of a transformer layer: what plans are chosen by.

    The linear layers of a rank come before its attention, one layer's last ones together with the
    next one's first. ``model_width`` as in :func:`dcp.cost.linear_seconds`. With ``gathers`` all
    ranks begin a layer together, as sharded weights that are gathered without prefetch make them.
    """
    return sum(_passes(plan, cluster, model_width, gathers)[0])


def layer_times(plan: Whole, cluster: Cluster, *, model_width: int | None = None) -> LayerTimes:
    """The seconds of :func:`layer_seconds` in parts."""
    linear = rank_linear_seconds(plan, cluster, model_width)
    ideal, speed = linear * sum(plan.weights.values()), cluster.speed_of_rank
    for name, weight in plan.weights.items():
        for backward in (False, True):
            ideal = ideal + weight * attention_seconds(
                plan.rank_areas(name) / speed, plan.spec, cluster, backward=backward
            )
    near = replace(
        cluster,
        inter_node_bandwidth=_ENDLESS,
        device_network_bandwidth=_ENDLESS,
        inter_node_latency=0.0,
    )
    limit = float((ideal * speed).sum() / speed.sum())  # all of it, by all of them together
    seconds, busy = _passes(plan, cluster, model_width)
    total, inside = sum(seconds), sum(_passes(plan, near, model_width)[0])
    return LayerTimes(
        seconds=total,
        limit=limit,
        imbalance=float(ideal.max()) - limit,
        kernels=float(busy.max() - ideal.max()),
        intra_node=float(inside - busy.max()),
        inter_node=float(total - inside),
    )


_ENDLESS = 1e18  # bytes per second


def rank_linear_seconds(plan: Whole, cluster: Cluster, model_width: int | None) -> np.ndarray:
    """Forward + backward seconds of each rank's linear layers."""
    per_token = linear_seconds(1.0, plan.spec, cluster, model_width=model_width)
    seconds: np.ndarray = plan.rank_tokens * per_token / cluster.speed_of_rank
    return seconds


def linear_share(*, backward: bool) -> float:
    """Of the linear layers' time: two products a weight backward, where forward has one."""
    return 2 / 3 if backward else 1 - 2 / 3


def _passes(
    plan: Whole, cluster: Cluster, model_width: int | None, gathers: bool = False
) -> tuple[list[float], np.ndarray]:
    """The period of every weighted pass, and the seconds that each rank is busy in all of them."""
    linear = rank_linear_seconds(plan, cluster, model_width)
    busy, seconds = np.zeros(plan.num_ranks), []
    for name, weight in plan.weights.items():
        for backward in (False, True):
            part = linear * linear_share(backward=backward)
            work = pass_work(plan, name, cluster, backward=backward)
            busy += weight * (part + work.compute.sum(axis=0))
            layers = 1 if gathers or plan.num_ranks > MANY_RANKS else NUM_LAYERS
            seconds.append(weight * period(work, part, layers))
    return seconds, busy


def period(work: Work, linear: np.ndarray, num_layers: int) -> float:
    """Seconds that one layer adds: of the linear layers, a step each, and the pass after them."""
    if not len(work.source):  # nobody waits
        return float((linear + work.compute.sum(axis=0)).max(initial=0.0))
    steps, flows = len(work.compute) + 1, len(work.source)
    again = {name: np.tile(getattr(work, name), num_layers) for name in _OF_FLOWS}
    shift = np.repeat(np.arange(num_layers) * steps + 1, flows)
    many = Work(
        compute=np.tile(np.vstack([linear, work.compute]), (num_layers, 1)),
        step=np.tile(work.step, num_layers) + shift,
        links=np.tile(work.links, (num_layers, 1)),
        capacity=work.capacity,
        **again,
    )
    line = many.play()
    ends = np.maximum(line.computed, line.arrived)[steps - 1 :: steps].max(axis=1)
    return float((ends[-1] - ends[0]) / (num_layers - 1) if num_layers > 1 else ends[0])


_OF_FLOWS = ("source", "target", "volume", "latency")
