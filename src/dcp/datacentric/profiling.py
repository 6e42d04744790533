"""The profile of a job: read, measured where it is missing, or both."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dcp.datacentric.measure import Meter, memory_cap
from dcp.datacentric.profile import Profile
from dcp.datacentric.search import candidate_degrees, search
from dcp.datacentric.workload import Workload
from dcp.train.config import TrainConfig

FILE = "profile.json"
STATES = 4  # of a weight: itself, its gradient, and two moments


def job_profile(
    config: TrainConfig,
    workload: Workload,
    model: nn.Module,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Profile:
    """The profile of all buckets that occur, equal on all ranks; the first one keeps the file.

    A file that is there is read; what it lacks is measured and written as it is found, so that a
    job which was stopped goes on, and only the first job pays.

    Raises ``ValueError`` for a damaged or foreign file, and for a bucket that does not fit.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    path = Path(config.profile_path or Path(config.output) / FILE)
    degrees = candidate_degrees(world) if config.dynamic_sp else [config.sp_size]
    if config.sp_size > world and not config.dynamic_sp:
        raise ValueError(f"config key sp_size={config.sp_size} is more than the {world} ranks")
    limit = memory_bytes(config, device)
    depth = {kind: min(config.profile_depth, count) for kind, count in workload.depth.items()}
    profile = Profile(
        machine=_machine(config, world, device),
        model={**workload.identity, "max_batch_size": config.max_batch_size},
        depth=dict(workload.depth),
        measured_depth=depth,
        memory_bytes=limit,
        static_bytes=STATES * sum(p.numel() * p.element_size() for p in model.parameters()),
    )
    if rank == 0 and path.exists():
        profile = Profile.load(path, machine=profile.machine, model=profile.model)
        if config.memory_limit_mb:
            profile.memory_bytes = limit
    profile = _spread(profile, group, device)
    meter = Meter(
        workload,
        group,
        device,
        depth=max(profile.measured_depth.values()),
        autocast=config.dtype == "bfloat16",
    )

    def save() -> None:
        if rank == 0:
            profile.save(path)
            if config.progress:
                print(f"\rprofile: {len(profile.found)} cases", end="", file=sys.stderr, flush=True)

    before = len(profile.found)
    if not profile.sync_seconds:
        profile.sync_seconds = meter.measure_sync(model)
    present = set(workload.bucket_of)
    with memory_cap(device, config.alloc_memory_fraction):
        search(
            profile,
            [bucket for bucket in workload.buckets if bucket.name in present],
            degrees,
            meter.measure,
            max_batch=dict.fromkeys(present, config.max_batch_size),
            save=save,
        )
    if rank == 0 and config.progress and len(profile.found) > before:
        print(f"\rprofile: {len(profile.found)} cases in {path}", file=sys.stderr)
    return profile


def memory_bytes(config: TrainConfig, device: torch.device) -> int:
    """What a rank may use: as configured, or a share of its GPU or of the free memory here."""
    if config.memory_limit_mb:
        return config.memory_limit_mb << 20
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        whole = free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(config.alloc_memory_fraction * whole)


def _machine(config: TrainConfig, world: int, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": f"{device.type} {name or platform.machine()}",
        "num_ranks": world,
        "ranks_per_node": int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        "threads": config.threads,
    }


def _spread(profile: Profile, group: dist.ProcessGroup, device: torch.device) -> Profile:
    """What the first rank knows, on every rank."""
    text = json.dumps(profile.to_json()).encode()
    size = torch.tensor([len(text)], device=device)
    first = dist.get_global_rank(group, 0)
    dist.broadcast(size, src=first, group=group)
    own = dist.get_rank(group) == 0
    content = np.frombuffer(text, dtype=np.uint8).copy() if own else np.zeros(int(size), np.uint8)
    message = torch.from_numpy(content).to(device)
    dist.broadcast(message, src=first, group=group)
    return Profile.from_json(json.loads(message.cpu().numpy().tobytes()))
