"""A cluster's rates, learnt from what its ranks ran: measured seconds in, a fitted cluster out.

Every rate is the given one (a preset's, or a file's of ``dcp profile``) times a multiplier of its
own. Multipliers are fitted to the last measurements by a robust regression of logarithms that
starts at 1 and is slow to leave it: a few disturbed passes change nothing, a rate that is wrong
by a factor is right after some batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.cost import division_seconds, item_seconds, linear_seconds
from dcp.kernel_table import scaled_table
from dcp.program import MaskProgram, RankPlan, row_bytes
from dcp.ragged import expand, runs
from dcp.slices import slice_area
from dcp.tables import Item, Move

KEPT = 64  # measurements of each rank that a fit remembers
PRIOR = 2.0  # measurements that the given rate counts as
ROBUST = 0.2  # of a logarithm: what deviates more pulls no harder
LATE = 0.2  # weight of a transfer that took longer than predicted: its peer may have come late
WAITED = 0.05  # of a transfer's seconds; waited for less, its end was not seen
ALIKE = 0.05  # ranks' speeds within that count as equal
SURE = 8  # measurements of a rank before its speed counts


@dataclass(frozen=True, eq=False, kw_only=True)
class PassFigures:
    """What the passes of one kind (plan, mask, direction) took on one rank: medians of its layers.

    Attributes:
        fingerprint, mask, backward: which kind.
        num_passes: how many there were.
        seconds: of a whole pass.
        attention_seconds, packing_seconds: sums over its divisions, and over its messages.
        between_seconds: from the pass before to one of the kind: the linear parts of a layer; None
            where that was never the layer before's.
        transfers: (step, seconds from its launch to its arrival, of those that the rank waited),
            one line per communication.
    """

    fingerprint: int
    mask: str
    backward: bool
    num_passes: int
    seconds: float
    attention_seconds: float
    packing_seconds: float
    between_seconds: float | None
    transfers: tuple[tuple[float, float, float], ...]


def program_seconds(
    program: MaskProgram,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    num_head_groups: int = 1,
    backward: bool = False,
) -> np.ndarray:
    """Predicted seconds of a rank's divisions, ``[steps]``, as if all ranks were as fast."""
    items = program.items
    count = items[:, Item.END_SLICE] - items[:, Item.FIRST_SLICE]
    which, _ = expand(count)
    areas = slice_area(program.slices[runs(items[:, Item.FIRST_SLICE], count)])
    seconds = item_seconds(
        np.bincount(which, weights=areas, minlength=len(items)),
        items[:, Item.Q_ROWS],
        items[:, Item.KV_ROWS],
        spec,
        cluster,
        num_head_groups=num_head_groups,
        backward=backward,
    )
    return division_seconds(items[:, Item.STEP], program.num_steps, seconds, cluster)


class Multipliers:
    """Multipliers of a few terms whose sum is a time, fitted to measured times.

    Minimises the sum over measurements of ``w * (log seconds - log (terms @ x)) ** 2``, by
    Gauss-Newton steps in ``log x``, with Huber's weights ``w`` (Robust Estimation of a Location
    Parameter, 1964). Every ``log x`` is measured to be 0 :data:`PRIOR` times beforehand.
    """

    def __init__(self, num_terms: int, num_ranks: int, *, late: float = 1.0) -> None:
        self.log = np.zeros(num_terms)
        self.rows: deque[list[float]] = deque(maxlen=KEPT * num_ranks)  # rank, seconds, terms
        self.late = late

    def add(self, rank: int, terms: Sequence[float], seconds: float) -> None:
        """One measurement: seconds that each term is predicted to take, and those of all."""
        if seconds > 0 and sum(terms) > 0:
            self.rows.append([rank, seconds, *terms])

    def fit(self) -> None:
        """Fit all multipliers to the measurements there are."""
        if not self.rows:
            return
        _, seconds, *columns = np.array(self.rows).T
        terms, log = np.stack(columns, axis=1), self.log
        for _ in range(30):
            parts = terms * np.exp(log)
            total = parts.sum(axis=1)
            residual = np.log(seconds / total)
            weight, given = _huber(residual), PRIOR * _huber(log)
            weight[residual > 0] *= self.late
            slope = parts / total[:, None]  # of log total by log x
            normal = (slope * weight[:, None]).T @ slope + np.diag(given)
            step = np.linalg.solve(normal, slope.T @ (weight * residual) - given * log)
            log = log + np.clip(step, -0.5, 0.5)
            if np.abs(step).max() < 1e-4:
                break
        self.log = log

    @property
    def values(self) -> list[float]:
        return [float(x) for x in np.exp(self.log)]

    def residuals(self) -> tuple[np.ndarray, np.ndarray]:
        """Rank of each measurement, and the logarithm of its seconds over the predicted."""
        if not self.rows:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        rank, seconds, *terms = np.array(self.rows).T
        return rank.astype(np.int64), np.log(seconds / (self.values @ np.stack(terms)))


def _huber(residual: np.ndarray) -> np.ndarray:
    """Weights of residuals in a sum of squares: what deviates much pulls no harder."""
    weight: np.ndarray = np.minimum(1.0, ROBUST / np.maximum(np.abs(residual), 1e-12))
    return weight


class RateFit:
    """The rates of a cluster as they are found to be.

    Args:
        cluster: the rates to start from.
        model_width: as for :class:`dcp.planner.Planner`.
    """

    def __init__(self, cluster: Cluster, *, model_width: int | None = None) -> None:
        self.given, self.model_width = cluster, model_width
        ranks = cluster.num_ranks
        self.compute = Multipliers(3, ranks)  # forward and backward arithmetic, launches
        self.far, self.near = (Multipliers(2, ranks, late=LATE) for _ in range(2))  # latency, bytes
        self.linear = Multipliers(1, ranks)
        self.packing: deque[tuple[float, float]] = deque(maxlen=KEPT * ranks)  # bytes, seconds
        self.num_batches = 0
        self.cluster = cluster
        self._lock = Lock()

    # ------------------------------------------------------------------ measurements

    def observe(
        self, plans: Sequence[RankPlan], figures: Mapping[int, Sequence[PassFigures]]
    ) -> None:
        """Learn from one batch: every rank's plan, and what ranks have measured.

        Figures of other plans than these are ignored. May run in a thread of its own.
        """
        links: dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]] = {}
        with self._lock:
            for rank, of_rank in figures.items():
                plan = plans[rank]
                for each in of_rank:
                    if each.fingerprint == plan.fingerprint and each.mask in plan.masks:
                        kind = each.mask, each.backward
                        if kind not in links:
                            links[kind] = self._link_seconds(plans, each)
                        self._compute(plan, each)
                        self._transfers(links[kind], plan, each)
                        self._pack(plan, each)
                        self._between(plan, each)
            self.num_batches += 1
            for each_fit in (self.compute, self.far, self.near, self.linear):
                each_fit.fit()
            self.cluster = self._fitted()

    def probe(self, *, far: Sequence[tuple[int, float]], near: Sequence[tuple[int, float]]) -> None:
        """Begin with links as they are: (bytes, seconds) of messages between two ranks alone, of
        two nodes and of one. What a node's ranks share keeps its ratio to what one of them has."""
        fields: dict[str, Any] = {}
        if far:
            fields["inter_node_latency"], card = _latency_and_bandwidth(far)
            ratio = self.given.inter_node_bandwidth / self.given.device_network_bandwidth
            fields["device_network_bandwidth"] = card
            fields["inter_node_bandwidth"] = card * max(ratio, 1.0)
        if near:
            found = _latency_and_bandwidth(near)
            fields["intra_node_latency"], fields["intra_node_bandwidth"] = found
        self.given = replace(self.given, **fields)
        self.cluster = self._fitted()

    def _compute(self, plan: RankPlan, figures: PassFigures) -> None:
        program = plan.masks[figures.mask]
        seconds = program_seconds(
            program,
            plan.spec,
            self.given,
            num_head_groups=plan.num_head_groups,
            backward=figures.backward,
        )
        launches = np.count_nonzero(seconds) * self.given.launch_seconds
        arithmetic = float(seconds.sum()) - launches
        terms = [0.0, arithmetic, launches] if figures.backward else [arithmetic, 0.0, launches]
        self.compute.add(plan.rank, terms, figures.attention_seconds)

    def _transfers(
        self, links: tuple[np.ndarray, np.ndarray], plan: RankPlan, figures: PassFigures
    ) -> None:
        """Of every communication: the links that it was on, whichever was the slowest."""
        far, near = links
        for step, seconds, waited in figures.transfers:
            index = int(step) - 1
            terms = {
                True: [self.given.inter_node_latency, far[index, plan.rank]],
                False: [self.given.intra_node_latency, near[index, plan.rank]],
            }
            fits = {True: self.far, False: self.near}
            predicted = {
                is_far: float(np.dot(terms[is_far], fits[is_far].values))
                if terms[is_far][1]
                else 0.0
                for is_far in terms
            }
            slowest = predicted[True] >= predicted[False]
            seen = waited > WAITED * seconds
            if predicted[slowest] and (seen or seconds < predicted[slowest]):
                fits[slowest].add(plan.rank, terms[slowest], seconds)

    def _link_seconds(
        self, plans: Sequence[RankPlan], figures: PassFigures
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds that each rank's communications take of its links between nodes, and inside its
        node, latencies left out: two ``[steps, ranks]``."""
        cluster, node = self.given, self.given.node_of_rank
        steps = max(each.masks[figures.mask].num_steps for each in plans)
        moved = np.zeros((2, 2, steps, len(plans)))  # out and in, near and far
        for each in plans:
            program = each.masks[figures.mask]
            for way, moves in enumerate((program.sends, program.receives)):
                volume = _volume(each, figures, moves)
                is_far = node[moves[:, Move.PEER]] != node[each.rank]
                index = is_far * steps + moves[:, Move.STEP] - 1
                sums = np.bincount(index, weights=volume, minlength=2 * steps)
                moved[way, :, :, each.rank] = sums.reshape(2, steps)
        near, far = moved.max(axis=0)
        of_node = node[:, None] == np.arange(cluster.num_nodes)
        nodes = (moved[:, 1] @ of_node).max(axis=0)  # [steps, nodes]
        shared = nodes[:, node] / cluster.inter_node_bandwidth
        alone = far / cluster.device_network_bandwidth
        between = np.where(far > 0, np.maximum(alone, shared), 0.0)
        return between, near / cluster.intra_node_bandwidth

    def _pack(self, plan: RankPlan, figures: PassFigures) -> None:
        volume = float(_volume(plan, figures, plan.masks[figures.mask].sends).sum())
        if volume and figures.packing_seconds > 0:
            self.packing.append((volume, figures.packing_seconds))

    def _between(self, plan: RankPlan, figures: PassFigures) -> None:
        """The linear parts of a layer: a third of their time is forward, the rest backward."""
        if figures.between_seconds is None or not plan.num_local_tokens:
            return
        whole = linear_seconds(
            plan.num_local_tokens, plan.spec, self.given, model_width=self.model_width
        )
        third = whole / 3 * (2 if figures.backward else 1)
        self.linear.add(plan.rank, [third], figures.between_seconds)

    # ------------------------------------------------------------------ the fit

    def _fitted(self) -> Cluster:
        given = self.given
        forward, backward, launch = self.compute.values
        (far_latency, far), (near_latency, near) = self.far.values, self.near.values
        pack = given.pack_bandwidth
        if len(self.packing) >= SURE:
            pack = float(np.median([volume / seconds for volume, seconds in self.packing]))
        linear = given.linear_flops or given.device_flops
        return replace(
            given,
            device_flops=given.device_flops / forward,
            memory_bandwidth=given.memory_bandwidth / forward,
            kernel_rates=tuple((side, rate / forward) for side, rate in given.kernel_rates),
            kernel_table=scaled_table(given.kernel_table, forward=forward, backward=backward),
            backward_ratio=given.backward_ratio * backward / forward,
            launch_seconds=given.launch_seconds * launch,
            inter_node_latency=given.inter_node_latency * far_latency,
            inter_node_bandwidth=given.inter_node_bandwidth / far,
            device_network_bandwidth=given.device_network_bandwidth / far,
            intra_node_latency=given.intra_node_latency * near_latency,
            intra_node_bandwidth=given.intra_node_bandwidth / near,
            pack_bandwidth=pack,
            linear_flops=linear / self.linear.values[0],
            rank_speeds=self._speeds(),
        )

    def _speeds(self) -> tuple[float, ...]:
        """Each rank's speed beside the median of all; none where all are about alike."""
        rank, residual = self.compute.residuals()
        counts = np.bincount(rank, minlength=self.given.num_ranks)
        if counts.min() < SURE:
            return self.given.rank_speeds
        slowness = np.array([np.median(residual[rank == each]) for each in range(len(counts))])
        slowness -= np.median(slowness)
        if np.abs(slowness).max() < ALIKE:
            return ()
        return tuple(np.exp(-slowness).tolist())

    @property
    def error(self) -> float:
        """How far the fit's predictions of attention and transfers are off, in the median."""
        off = np.concatenate([fit.residuals()[1] for fit in (self.compute, self.far, self.near)])
        return float(np.median(np.abs(off))) if len(off) else float("inf")

    # ------------------------------------------------------------------ in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, and the rates that it was measured against; JSON-able."""
        with self._lock:
            return {
                "num_batches": self.num_batches,
                "given": self.given.to_json(),
                **{name: list(getattr(self, name).rows) for name in _FITS},
                "packing": [list(each) for each in self.packing],
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; of other ranks, their speeds are forgotten."""
        with self._lock:
            self.num_batches = int(state["num_batches"])
            given, here = Cluster(**state["given"]), self.given
            same = given.num_ranks == here.num_ranks
            self.given = replace(
                given,
                num_nodes=here.num_nodes,
                devices_per_node=here.devices_per_node,
                rank_speeds=given.rank_speeds if same else (),
            )
            for name in _FITS:
                fit: Multipliers = getattr(self, name)
                fit.rows.clear()
                for rank, seconds, *terms in state[name]:
                    fit.add(int(rank) if same else 0, terms, seconds)
                fit.fit()
            self.packing.extend(
                (float(volume), float(seconds)) for volume, seconds in state["packing"]
            )
            self.cluster = self._fitted()


def _latency_and_bandwidth(seen: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Of a link, from the times of a small message and a large one."""
    (small, latency), (large, seconds) = min(seen), max(seen)
    return latency, (large - small) / max(seconds - latency, 1e-9)


def _volume(plan: RankPlan, figures: PassFigures, moves: np.ndarray) -> np.ndarray:
    """Bytes of each of a program's moves in the pass that the figures are of."""
    size = row_bytes(
        plan.spec,
        plan.num_head_groups,
        gradients_hop=plan.masks[figures.mask].gradients_hop,
        backward=figures.backward,
    )
    volume: np.ndarray = moves[:, Move.ROWS] * size[moves[:, Move.BUFFER]]
    return volume


_FITS = ("compute", "far", "near", "linear")
