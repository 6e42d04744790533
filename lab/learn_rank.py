"""One rank that trains nothing: it learns rates from planned batches, then times every rule."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.data import DCPDataLoader
from dcp.launch.group import joined_group
from dcp.placement import StrategyError
from dcp.planner import plan
from dcp.runtime import AttentionExecutor
from lab.emulated_rank import (
    Emulated,
    SleepingKernel,
    SlowCommunicator,
    cluster_of,
    measure_links,
    time_layers,
)


def learn(job: dict[str, Any]) -> dict[str, Any]:
    """Batches under ``auto`` whose rates begin wrong, and then some more beside all rules.

    Returns ``steps``, seconds of every learning batch, ``cluster``, the rates found (on rank 0),
    and ``compared``, seconds by rule of each batch and round after that.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec, true = AttentionSpec(**job["spec"]), cluster_of(job["true"])
    with joined_group(torch.device("cpu")) as group:
        here = _here(group, spec, true, job)
        links = measure_links(true) if job["sleeps"] else {}
        documents = [np.zeros(length, dtype=np.int64) for length in job["lengths"]]
        with DCPDataLoader(
            documents,
            job["mask"],
            spec=spec,
            tokens_per_batch=job["tokens_per_batch"],
            cluster=cluster_of(job["given"]),
            group=group,
            look_ahead=2,
            plan_options={"model_width": job["model_width"]},
        ) as loader:
            if job["learns"]:
                loader.learn_from(here.executor)
            steps, predicted, compared = [], [], []
            batches = iter(loader)
            for _ in range(job["num_batches"]):
                _, mine = next(batches)
                here.executor.prepare(mine)
                steps.append(time_layers(here, job["layers"]) / job["layers"])
                predicted.append(mine.stats.layer_seconds)
            for _ in range(job["num_compared"]):
                batch, mine = next(batches)
                plans = {"auto": mine} | _rules(batch.seqlens, true, spec, job, here)
                compared.append(_compare(plans, here, job))
            rates = asdict(loader.rates.cluster) if loader.rates else None
            error = loader.rates.error if loader.rates else None
        dist.barrier()
    return {"steps": steps, "predicted": predicted, "compared": compared, "links": links,
            "cluster": rates, "error": error}  # fmt: skip


def _here(
    group: dist.ProcessGroup, spec: AttentionSpec, true: Cluster, job: dict[str, Any]
) -> Emulated:
    """The rank's executor: with sleeping kernels in stretched time, or as it is."""
    width = job["model_width"]
    if not job["sleeps"]:
        return Emulated(AttentionExecutor(group), spec, true, width)
    slowness = float(job["slowness"][dist.get_rank(group)])
    executor = AttentionExecutor(group, kernel=SleepingKernel(spec, true, slowdown=slowness))
    executor.communicator = SlowCommunicator(group, true)
    return Emulated(executor, spec, true, width, slowness)


def _rules(
    seqlens: np.ndarray, true: Cluster, spec: AttentionSpec, job: dict[str, Any], here: Emulated
) -> dict[str, Any]:
    """This rank's plan of a batch by each rule, made with the true rates."""
    found = {}
    batch = SequenceBatch(seqlens, job["mask"])
    for name in job["rules"]:
        try:
            made = plan(batch, spec, true, strategy=name, model_width=job["model_width"])
        except StrategyError:
            continue
        found[name] = made.rank_plan(here.executor.rank)
    return found


def _compare(plans: dict[str, Any], here: Emulated, job: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of a layer by each plan, round after round."""
    times: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(job["rounds"] + job["warm_up"]):
        for name, mine in plans.items():
            here.executor.prepare(mine)
            seconds = time_layers(here, job["layers"]) / job["layers"]
            if turn >= job["warm_up"]:
                times[name].append(seconds)
    return times
