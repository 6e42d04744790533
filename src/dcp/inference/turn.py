"""One turn of inference as a plan: new tokens of some sequences over what is cached of them.

Every rank plans the same turn from the same numbers, so nothing has to be agreed upon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable
from dcp.checks import one_of
from dcp.cluster import Cluster
from dcp.masks import AttnMask
from dcp.placement.passing import pass_either, pass_kv, pass_q, place_tokens
from dcp.plans import Plan
from dcp.simulate import simulate

PLACEMENTS = {"pass_kv": pass_kv, "pass_q": pass_q, "pass_either": pass_either}
STRATEGIES = (*PLACEMENTS, "planned")
# a rule of one's own: (new tokens, cached tokens, spec, cluster) -> one of STRATEGIES
Selector = Callable[[int, int, AttentionSpec, Cluster], str]


def plan_turn(
    new: Sequence[int] | np.ndarray,
    cached: Sequence[Sequence[int]] | np.ndarray,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    strategy: str | Selector = "planned",
    shifts: Sequence[int] | None = None,
    masks: str | Sequence[AttnMask | str] = "causal",
) -> Plan:
    """Plan attention of new tokens over cached and new ones.

    Args:
        new: new tokens of each sequence; one each is a step of decoding.
        cached: tokens of each sequence that each rank holds, ``[num_sequences, num_ranks]``.
        strategy: ``"pass_kv"``, ``"pass_q"``, ``"pass_either"``; or ``"planned"``: all three are
            planned and simulated, the fastest is taken; or a function that names one of these,
            from the totals of new and cached tokens, ``spec`` and ``cluster``.
        shifts: of each sequence, the rank that a lone token goes to (see
            :func:`dcp.placement.passing.place_tokens`); ``0, 1, …`` by default.
        masks: what the new tokens of each sequence see, of the cached ones rank by rank and of each
            other: new x (cached + new). By default all before them.

    Raises ``ValueError`` for an unknown strategy or arrays that do not fit.
    """
    held = np.asarray(cached, dtype=np.int64)
    tokens = np.asarray(new, dtype=np.int64)
    if held.shape != (len(tokens), cluster.num_ranks):
        raise ValueError(
            f"cached has shape {held.shape}, {len(tokens)} sequences on {cluster.num_ranks} ranks "
            f"need {(len(tokens), cluster.num_ranks)}"
        )
    if (tokens < 0).any():
        raise ValueError(f"new tokens must be 0 or more, got {tokens.tolist()}")
    if callable(strategy):
        strategy = strategy(int(tokens.sum()), int(held.sum()), spec, cluster)
    one_of("strategy", strategy, STRATEGIES)
    batch = SequenceBatch(tokens + held.sum(axis=1), masks, cached=held)
    shifts = range(len(tokens)) if shifts is None else shifts
    blocks, owner = place_tokens(batch, spec, cluster.num_ranks, shifts)
    if strategy == "planned":
        return _fastest(blocks, owner, cluster)
    return next(_plans(strategy, blocks, owner, cluster))


def _fastest(blocks: BlockTable, owner: np.ndarray, cluster: Cluster) -> Plan:
    """Of all placements and numbers of divisions, by simulation."""
    timed: list[tuple[float, str, Plan]] = []
    for name in PLACEMENTS:
        for plan in _plans(name, blocks, owner, cluster):
            plan.stats.simulated = simulate(plan, cluster, backward=False).to_json()
            timed.append((plan.stats.simulated["forward_seconds"], name, plan))
    _, _, best = min(timed, key=lambda each: each[0])
    best.stats.notes["candidates"] = {
        name: min(seconds for seconds, of, _ in timed if of == name) for name in PLACEMENTS
    }
    return best


def _plans(name: str, blocks: BlockTable, owner: np.ndarray, cluster: Cluster) -> Iterator[Plan]:
    """The plans of one placement: a ring's one, or one per number of divisions worth trying."""
    placement = PLACEMENTS[name](blocks, owner, cluster)
    fixed = placement.num_divisions
    for count in (fixed,) if fixed else sorted({2, cluster.num_ranks}):
        yield Plan.from_placement(placement, cluster, strategy=name, num_divisions=count)
