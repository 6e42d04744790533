"""Other projects' own planners, where they are installed: their placements, run by our executor.

Peers are never dependencies: one that is not installed is left out, with the reason.
"""

from __future__ import annotations

import warnings

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement, StrategyError
from dcp.placement.grids import Grid, place_on_grids
from dcp.plans import Plan

MEGATRON = "Megatron hybrid CP"


class _Size:
    """All that Megatron's scheduler asks of a process group."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def plan_megatron(batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> Plan:
    """Megatron-Core's ``BalancedCPScheduler``: its groups, every sequence in zigzag over its own.

    A rank may hold the mean rank's tokens. Megatron runs one group after another with a barrier
    between; here all run in one pass without, which can only help it.

    Raises :class:`StrategyError` where megatron-core is not installed, or cannot place the batch.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of accelerator packages, not used here
            from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler
    except ImportError as error:
        raise StrategyError(f"pip install --no-deps megatron-core ({error})") from None
    most = -(-batch.num_tokens // cluster.num_ranks)
    scheduler = BalancedCPScheduler(most, _Size(cluster.num_ranks))
    samples = list(enumerate(batch.seqlens.tolist()))
    try:
        _, turns = scheduler.get_groups_and_subsamples(samples, None)
    except (AssertionError, IndexError, ValueError) as error:
        raise StrategyError(f"megatron-core could not place the batch: {error!r}") from None
    placement = _on_ranks(batch, spec, ranks_of_samples(turns), cluster.num_ranks)
    return Plan.from_placement(placement, cluster, strategy=MEGATRON)


def ranks_of_samples(turns: list[list[list[int]]]) -> dict[int, tuple[int, ...]]:
    """Ranks of each sample, of the samples of each rank, turn by turn."""
    ranks: dict[int, tuple[int, ...]] = {}
    for turn in turns:
        for rank, samples in enumerate(turn):
            for sample in samples:
                ranks[sample] = (*ranks.get(sample, ()), rank)
    return ranks


def _on_ranks(
    batch: SequenceBatch, spec: AttentionSpec, ranks: dict[int, tuple[int, ...]], num_ranks: int
) -> Placement:
    distinct = sorted(set(ranks.values()))
    return place_on_grids(
        batch,
        spec,
        [Grid(np.array(members)[:, None]) for members in distinct],
        np.array([distinct.index(ranks[i]) for i in range(len(batch.seqlens))], dtype=np.int64),
        num_ranks=num_ranks,
    )
