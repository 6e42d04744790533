"""What ``python -m lab emulate`` runs: strategies' plans, those worth it, and how slow each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from dcp.cluster import Cluster
from dcp.placement import StrategyError, strategy_names
from dcp.planner import plan
from dcp.plans import Plan
from dcp.program import row_bytes
from lab.attention import OURS, STATIC
from lab.emulated_network import LEAST_BYTES
from lab.emulated_rank import CHECK_SECONDS
from lab.planner import SPEC, make_batch

TIME_BUDGET = 2.0  # seconds that auto may search for: what a loader beside GPUs gives it
CORE_SECONDS_PER_BYTE = 4e-9  # that a message takes, from one rank's buffer to the other's
MOST_BYTES_PER_SECOND = 1.3e9  # that two cores pass on between namespaces, in large messages
RANK_BYTES = 250 << 20  # of memory, without messages
COPIES = 3  # of all rows that a rank holds: as they are, packed, and on their way
OWN_SECONDS = 0.03  # of a core that a rank's pass takes, whatever its length
OWN_SHARE = 0.08  # of a pass that this may be
LEAST_DILATION = 200.0
LEAST_PACKETS = 80  # of a card in the time that its link is checked for: at fewer it looks faster
CAREFUL = 0.45  # busy share that the dilation is chosen for


def chosen_strategies(given: Sequence[str]) -> list[str]:
    """Names, with ``static`` and ``all`` as what they stand for."""
    known = {"static": [OURS, *STATIC], "all": [OURS, *strategy_names()]}
    names = [name for word in given for name in known.get(word, [word])]
    for name in names:
        if name != OURS and name not in strategy_names():
            raise ValueError(f"--strategies: {name!r} is not auto, static, all, or one of "
                             f"{', '.join(strategy_names())}")  # fmt: skip
    return list(dict.fromkeys(names))


def make_cases(
    batch: dict[str, Any], mask: str, names: Sequence[str], cluster: Cluster, *, layers: int
) -> Iterator[tuple[dict[str, str], Plan]]:
    """Every strategy of a batch and mask that has a plan; one plan may be made by several."""
    width = None if layers else 0
    for name in names:
        labels = {"strategy": name, "batch": batch["name"], "mask": mask}
        with suppress(StrategyError):
            made = plan(make_batch(batch["seqlens"], mask), SPEC, cluster, strategy=name,
                        model_width=width, time_budget=TIME_BUDGET)  # fmt: skip
            yield labels, made


def fits_in_memory(labels: dict[str, str], made: Plan) -> bool:
    """Whether all ranks' messages do, which have their true sizes; says so where they do not."""
    needed = made.num_ranks * RANK_BYTES
    for work in made.masks.values():
        size = row_bytes(
            made.spec, made.num_head_groups, gradients_hop=work.gradients_hop, backward=True
        )
        needed += COPIES * int((work.buffer_rows * size).sum())
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        print(f"left out: {' '.join(labels.values())} needs {needed / 1e9:.0f} GB of memory, "
              f"{available / 1e9:.0f} are free", file=sys.stderr)  # fmt: skip
    return needed <= available


def worth_running(
    cases: Sequence[tuple[dict[str, str], Plan]], *, within: float
) -> list[tuple[dict[str, str], Plan]]:
    """Those predicted within a factor of the fastest of one batch and mask, and the fastest static
    rule of those given."""
    limit = within * min(predicted_seconds(made) for _, made in cases)
    static = min(
        (predicted_seconds(made) for labels, made in cases if is_static(labels)), default=limit
    )
    return [
        (labels, made)
        for labels, made in cases
        if predicted_seconds(made) <= limit
        or (is_static(labels) and predicted_seconds(made) == static)
    ]


def is_static(labels: dict[str, str]) -> bool:
    return labels["strategy"] in STATIC


def predicted_seconds(made: Plan) -> float:
    """Of attention, forward and backward (of a turn of inference, forward)."""
    simulated = made.stats.simulated
    return float(simulated["forward_seconds"] + simulated.get("backward_seconds", 0.0))


def wanted_dilation(made: Plan, cluster: Cluster) -> float:
    """So slow that the cores have time for a plan's messages, to fill all links, and for their own
    work of its shorter pass; in steps of two times, so that plans share a network."""
    moved = sum(
        int(made.moved_bytes(mask, backward=backward).sum())
        for mask in made.masks
        for backward in (False, True)
    )
    needed = max(
        moved * CORE_SECONDS_PER_BYTE / (2 * CAREFUL * predicted_seconds(made)),
        own_share(made, 1.0) / OWN_SHARE,
    )
    least, most = LEAST_DILATION, np.inf
    if cluster.node_sizes.max() > 1:
        links = cluster.num_ranks * cluster.intra_node_bandwidth / MOST_BYTES_PER_SECOND
        least = max(least, np.ceil(links / 100) * 100)
    if cluster.num_nodes > 1:
        card = min(cluster.device_network_bandwidth, cluster.inter_node_bandwidth)
        most = CHECK_SECONDS * card / (LEAST_PACKETS * LEAST_BYTES)
    steps = np.log2(max(needed, least) / least), np.log2(max(most, least) / least)
    return float(least * 2 ** min(np.ceil(steps[0]), np.floor(steps[1])))


def own_share(made: Plan, dilation: float) -> float:
    """What the cores' own work for all ranks is of the plan's shorter pass."""
    shorter = min(made.stats.simulated[f"{which}_seconds"] for which in ("forward", "backward"))
    return made.num_ranks * OWN_SECONDS / (2 * dilation * shorter)
