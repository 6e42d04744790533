"""Plans on the ranks of a testbed: what is asked of them, and the cluster that they measure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean, median
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.plans import Plan
from lab.testbed import Testbed


def run_plans(
    bed: Testbed,
    plans: Sequence[Plan],
    spec: AttentionSpec,
    *,
    ranks_per_node: int,
    repeat: int = 0,
    rates: bool = False,
    local: bool = False,
) -> list[dict[str, Any]]:
    """What every rank found (:mod:`lab.testbed_rank`), rank by rank.

    Args:
        repeat: rounds over all plans that are timed, after one to warm up.
        rates: also measure kernels and links, before the plans and (if any) after them.
        local: also time all ranks' work of each plan inside one process.
    """
    with tempfile.TemporaryDirectory(prefix="dcp-testbed-") as folder:
        paths = [f"{folder}/{i}.plan" for i in range(len(plans))]
        for made, path in zip(plans, paths, strict=True):
            made.save(path)
        job = {
            "plans": paths,
            "spec": asdict(spec),
            "local_size": ranks_per_node,
            "repeat": repeat,
            "rates": rates,
            "local": local,
        }
        return bed.run("lab.testbed_rank:measure", job, ranks_per_node=ranks_per_node)


def measured_cluster(found: list[dict[str, Any]], like: Cluster, *, name: str) -> Cluster:
    """The cluster that the ranks measured, before and after the runs: means of all."""
    seen = [rates for rank in found for rates in rank["rates"]]
    fields = {
        field: mean(rates[field] for rates in seen)
        for field in seen[0]
        if field not in ("kernel_rates", "kernel_tile", "device_flops")
    }
    every = np.array([rates["kernel_rates"] for rates in seen])
    sides, means = every[0, :, 0].astype(int).tolist(), every[:, :, 1].mean(axis=0).tolist()
    kernel_rates = tuple(zip(sides, means, strict=True))
    fields["kernel_tile"] = round(median(rates["kernel_tile"] for rates in seen))
    flops = max(rate for _, rate in kernel_rates)
    return replace(like, name=name, kernel_rates=kernel_rates, device_flops=flops, **fields)
