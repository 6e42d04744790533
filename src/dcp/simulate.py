"""Plan x cluster -> when everything would happen.

Every rank has a compute stream and links; the links, latencies and rates are the cluster's. Flows
that share a link share it fairly (see :mod:`dcp.events`); a division's time is a roofline over its
items (see :mod:`dcp.cost`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.compile import MaskTables
from dcp.cost import division_seconds, item_seconds
from dcp.events import play
from dcp.tables import Item, Move

COMPUTE, TRANSFER = "compute", "transfers"  # the two tracks of a rank


@dataclass(frozen=True)
class Span:
    """Something that takes, or took, time on one rank: seconds from a common begin."""

    rank: int
    track: str
    name: str
    start: float
    end: float


class Timed(Protocol):
    """What times need of a plan; see :class:`dcp.Plan`."""

    @property
    def num_ranks(self) -> int: ...
    @property
    def num_head_groups(self) -> int: ...
    @property
    def spec(self) -> AttentionSpec: ...
    @property
    def masks(self) -> dict[str, MaskTables]: ...
    @property
    def weights(self) -> dict[str, float]: ...
    def moved_bytes(self, mask: str, *, backward: bool = False) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class PassTimeline:
    """One pass of one mask: seconds from its begin, each ``[steps, ranks]``.

    In step ``t`` a rank computes division ``t`` from ``begin`` to ``computed``, while
    communication ``t + 1`` runs until ``arrived``.
    """

    begin: np.ndarray
    computed: np.ndarray
    arrived: np.ndarray

    @property
    def seconds(self) -> float:
        """When the last rank ends."""
        last = np.maximum(self.computed[-1], self.arrived[-1])
        return float(last.max(initial=0.0))

    @property
    def compute_seconds(self) -> np.ndarray:
        """Seconds that each rank computes, ``[ranks]``."""
        seconds: np.ndarray = (self.computed - self.begin).sum(axis=0)
        return seconds


@dataclass(frozen=True, eq=False)
class Timeline:
    """Predicted times of one plan.

    Seconds are sums over the masks, weighted by the layers that use each.
    ``exposed_comm_seconds`` is what the forward pass takes beyond its busiest rank's compute.
    """

    forward_seconds: float
    backward_seconds: float
    exposed_comm_seconds: float
    forward: dict[str, PassTimeline] = field(repr=False)
    backward: dict[str, PassTimeline] = field(repr=False)

    def to_json(self) -> dict[str, float]:
        """The ``simulated`` object of ``dcp plan --json``."""
        names = ("forward_seconds", "backward_seconds", "exposed_comm_seconds")
        return {name: getattr(self, name) for name in names}

    def _repr_html_(self) -> str:
        from dcp.pictures.plan import timeline_html

        every = {"forward": self.forward, "backward": self.backward}
        passes = {
            label if len(masks) == 1 else f"{label}, mask {name}": (p.begin, p.computed, p.arrived)
            for label, masks in every.items()
            for name, p in masks.items()
        }
        return timeline_html(passes, **self.to_json())


def simulate(plan: Timed, cluster: Cluster, *, backward: bool = True) -> Timeline:
    """Predict the passes of ``plan`` on ``cluster`` (which may have other rates than its own).

    Without ``backward`` that pass is left out and takes 0 seconds: inference has none.
    """
    if cluster.num_ranks != plan.num_ranks:
        raise ValueError(f"the plan is for {plan.num_ranks} ranks, not {cluster.num_ranks}")
    forward = {name: _play_pass(plan, name, cluster, backward=False) for name in plan.masks}
    names = plan.masks if backward else {}
    behind = {name: _play_pass(plan, name, cluster, backward=True) for name in names}
    weights = plan.weights
    exposed = {
        name: max(p.seconds - float(p.compute_seconds.max()), 0.0) for name, p in forward.items()
    }
    return Timeline(
        forward_seconds=sum(weights[name] * p.seconds for name, p in forward.items()),
        backward_seconds=float(sum(weights[name] * p.seconds for name, p in behind.items())),
        exposed_comm_seconds=float(sum(weights[name] * exposed[name] for name in exposed)),
        forward=forward,
        backward=behind,
    )


@dataclass(frozen=True, eq=False)
class Work:
    """What one pass of one mask has to do: seconds of every division, ``[steps, ranks]``, and the
    flows, each launched in step ``step`` over four links."""

    compute: np.ndarray
    source: np.ndarray
    target: np.ndarray
    step: np.ndarray
    volume: np.ndarray
    latency: np.ndarray
    links: np.ndarray
    capacity: np.ndarray

    def play(self) -> PassTimeline:
        """When all of it happens."""
        (steps, ranks), flows = self.compute.shape, len(self.source)
        # both ends of a flow, in the numbering of (step, rank), for the ranks' waits
        begun = self.step * ranks
        ends = np.concatenate([begun + self.source, begun + self.target])
        order = np.argsort(ends, kind="stable")
        rank_start = np.searchsorted(ends[order], np.arange(steps * ranks + 1))
        return PassTimeline(
            *play(
                self.compute, self.source, self.target, self.step, self.volume, self.latency,
                self.links, self.capacity, order % max(flows, 1), rank_start,
            )
        )  # fmt: skip


Flows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of each flow the source, target, step (from 0 on) and bytes."""


def pass_work(plan: Timed, mask: str, cluster: Cluster, *, backward: bool) -> Work:
    """The divisions and flows of one pass, at the rates of ``cluster``."""
    volume = plan.moved_bytes(mask, backward=backward)
    flows = sum_flows(plan.masks[mask].sends, volume, plan.num_ranks)
    compute = _compute_seconds(plan, mask, cluster, backward=backward)
    work = flow_work(compute, flows, cluster)
    if cluster.pack_bandwidth:  # the rank's own stream packs and unpacks, before and after a flow
        packing = work.volume / cluster.pack_bandwidth
        for end in (work.source, work.target):
            np.add.at(compute, (work.step, end), packing)
        work = replace(work, latency=work.latency + 2 * packing)
    return work


def flow_work(compute: np.ndarray, flows: Flows, cluster: Cluster) -> Work:
    """Divisions and flows with the latencies and links of ``cluster``."""
    source, target, step, volume = flows
    node = cluster.node_of_rank
    crosses = node[source] != node[target]
    latency = np.where(crosses, cluster.inter_node_latency, cluster.intra_node_latency)
    links, capacity = _links(source, target, crosses, cluster)
    return Work(compute, source, target, step, volume, latency, links, capacity)


def _play_pass(plan: Timed, mask: str, cluster: Cluster, *, backward: bool) -> PassTimeline:
    return pass_work(plan, mask, cluster, backward=backward).play()


def sum_flows(sends: np.ndarray, volume: np.ndarray, ranks: int) -> Flows:
    """One flow per (step, source, target).

    Args:
        sends: lines of :class:`dcp.tables.Move`; volume: bytes of each.
    """
    keep = volume > 0
    step, source, target = sends[keep][:, [Move.STEP, Move.RANK, Move.PEER]].T
    key = ((step - 1) * ranks + source) * ranks + target
    flows, index = np.unique(key, return_inverse=True)
    total = np.bincount(index, weights=volume[keep], minlength=len(flows))
    return flows // ranks % ranks, flows % ranks, flows // (ranks * ranks), total


def _links(
    source: np.ndarray, target: np.ndarray, crosses: np.ndarray, cluster: Cluster
) -> tuple[np.ndarray, np.ndarray]:
    """The four links that each flow takes, ``[flows, 4]``, and every link's bytes per second.

    Inside a node: the devices' own links. Between nodes: the source's network card and its node's
    network, out, then the same at the target, in. A flow with fewer takes the last, endless link.
    """
    ranks, nodes, node = cluster.num_ranks, cluster.num_nodes, cluster.node_of_rank
    size = [ranks, ranks, ranks, ranks, nodes, nodes, 1]
    device_out, device_in, card_out, card_in, node_out, node_in, endless = np.cumsum(
        [0, *size[:-1]]
    )
    far = (card_out + source, node_out + node[source], node_in + node[target], card_in + target)
    near = (device_out + source, device_in + target, endless, endless)
    links = [np.where(crosses, *pair) for pair in zip(far, near, strict=True)]
    device, card = cluster.intra_node_bandwidth, cluster.device_network_bandwidth
    network = cluster.inter_node_bandwidth
    capacity = np.repeat([device, device, card, card, network, network, np.inf], size)
    return np.stack(links, axis=1), capacity


def _compute_seconds(plan: Timed, mask: str, cluster: Cluster, *, backward: bool) -> np.ndarray:
    """Seconds of every division: one launch and its items, ``[steps, ranks]``."""
    tables, ranks = plan.masks[mask], plan.num_ranks
    items = tables.items
    seconds = item_seconds(
        tables.tile_area[items[:, Item.TILE]],
        items[:, Item.Q_ROWS],
        items[:, Item.KV_ROWS],
        plan.spec,
        cluster,
        num_head_groups=plan.num_head_groups,
        backward=backward,
    )
    division = items[:, Item.STEP] * ranks + items[:, Item.RANK]
    every = division_seconds(division, tables.num_steps * ranks, seconds, cluster)
    by_rank: np.ndarray = every.reshape(tables.num_steps, ranks) / cluster.speed_of_rank
    return by_rank
