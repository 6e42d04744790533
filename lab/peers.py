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
Turns = list[list[list[int]]]  # turn by turn and rank by rank: samples


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
    turns = megatron_turns(batch.seqlens.tolist(), cluster.num_ranks)
    placement = _on_ranks(batch, spec, ranks_of_samples(turns), cluster.num_ranks)
    return Plan.from_placement(placement, cluster, strategy=MEGATRON)


def plan_megatron_turns(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, any_degree: bool = False
) -> list[Plan]:
    """The same groups as Megatron runs them: a plan for each turn, one after another.

    Its dynamic context parallelism (``default_dynamic_cp``, which no release has yet) forms turns
    by the same rule, and makes a micro-batch of each. ``any_degree``: a sequence gets the least
    ranks that hold it, and not a power of two.
    """
    turns = megatron_turns(batch.seqlens.tolist(), cluster.num_ranks, any_degree=any_degree)
    plans = []
    for turn in turns:
        ranks = ranks_of_samples([turn])
        samples = np.array(sorted(ranks))
        masks = {name: [of[i] for i in samples] for name, of in batch.masks.items()}
        part = SequenceBatch(batch.seqlens[samples], masks, weights=batch.weights)
        placement = _on_ranks(
            part, spec, {i: ranks[s] for i, s in enumerate(samples.tolist())}, cluster.num_ranks
        )
        plans.append(Plan.from_placement(placement, cluster, strategy=MEGATRON))
    return plans


def megatron_turns(seqlens: list[int], num_ranks: int, *, any_degree: bool = False) -> Turns:
    """Samples of each rank in each turn of ``BalancedCPScheduler``, where a rank may hold the mean
    rank's tokens."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of accelerator packages, not used here
            from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler
    except ImportError as error:
        raise StrategyError(f"pip install --no-deps megatron-core ({error})") from None
    most = -(-sum(seqlens) // num_ranks)
    scheduler = BalancedCPScheduler(most, _Size(num_ranks))
    if any_degree:
        scheduler.gpus_needed = lambda tokens: max(-(-tokens // most), 1)
    try:
        _, turns = scheduler.get_groups_and_subsamples(list(enumerate(seqlens)), None)
    except (AssertionError, IndexError, ValueError) as error:
        raise StrategyError(f"megatron-core could not place the batch: {error!r}") from None
    return turns


def ranks_of_samples(turns: Turns) -> dict[int, tuple[int, ...]]:
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
