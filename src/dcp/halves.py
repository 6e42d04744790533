"""Two plans over one batch, for half-batches that take turns (:mod:`dcp.runtime.turns`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.cost import sequence_seconds
from dcp.planner import Planner
from dcp.plans import Plan


def plan_halves(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, **options: Any
) -> list[tuple[np.ndarray, Plan]]:
    """Two half-batches of about equal seconds, whole sequences each, and their plans.

    Every plan deals its half out evenly, so that ranks are in step whichever half they are at.
    Unless ``options``, those of :class:`dcp.Planner`, say otherwise, a plan has two divisions: what
    needs no message, and the rest. More of them would hide what the other half hides already.

    Returns for each half the indices of its sequences in the batch and its plan; one pair for a
    batch of a single sequence.
    """
    planner = Planner(spec, cluster, **{"num_divisions": 2} | options)
    width = options.get("model_width")
    return [
        (chosen, planner.plan(batch.reordered(chosen)))
        for chosen in halves(sequence_seconds(batch, spec, cluster, model_width=width))
    ]


def halves(seconds: np.ndarray) -> list[np.ndarray]:
    """Indices of two parts of about equal sums, the largest dealt out first; no part is empty."""
    parts: tuple[list[int], list[int]] = ([], [])
    sums = [0.0, 0.0]
    for index in np.argsort(-seconds, kind="stable").tolist():
        side = int(sums[1] < sums[0])
        parts[side].append(index)
        sums[side] += float(seconds[index])
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts if part]
