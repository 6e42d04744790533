"""The profile of a job: read, measured where it is missing, or both."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments

from dcp.datacentric.config import DataCentricArguments
from dcp.datacentric.measure import Meter, memory_cap
from dcp.datacentric.profile import Profile
from dcp.datacentric.search import candidate_degrees, search
from dcp.datacentric.workload import Workload
from dcp.launch.environment import local_world_size

FILE = "profile.json"
STATES = 4  # of a weight: itself, its gradient, and two moments


def job_profile(
    config: DataCentricArguments,
    run: TrainingArguments,
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
    num_ranks, first = dist.get_world_size(group), dist.get_rank(group) == 0
    if config.sp_size > num_ranks and not config.dynamic_sp:
        raise ValueError(f"--sp-size {config.sp_size} is more than the {num_ranks} ranks")
    profile = _empty_profile(config, run, workload, model, num_ranks, device)
    path = path_of(config.profile_path, str(run.output_dir), profile)
    if first and path.exists():
        profile = _read_profile(config, path, expected=profile)
    profile = _spread(profile, group, device)
    known = len(profile.found)

    def save() -> None:
        if first:
            profile.save(path)
            _show(run, f"{len(profile.found)} cases", end="")

    _measure_missing(config, profile, workload, model, group, device, save, autocast=run.bf16)
    if first and len(profile.found) > known:
        _show(run, f"{len(profile.found)} cases in {path}")
    return profile


def path_of(asked: str, output_dir: str, profile: Profile) -> Path:
    """Where a job's profile is: the file that is asked for, or the one of this machine and model in
    a folder, which exists or is written with a slash at its end; else in the output folder."""
    if not asked:
        return Path(output_dir) / FILE
    is_folder = asked.endswith("/") or Path(asked).is_dir()
    return Path(asked) / profile.file_name if is_folder else Path(asked)


def _empty_profile(
    config: DataCentricArguments,
    run: TrainingArguments,
    workload: Workload,
    model: nn.Module,
    num_ranks: int,
    device: torch.device,
) -> Profile:
    """The job's profile before anything is measured."""
    depth = {kind: min(config.profile_depth, count) for kind, count in workload.depth.items()}
    return Profile(
        machine=_machine(run, num_ranks, device),
        model={
            **workload.identity,
            "max_batch_size": config.max_batch_size,
            "autocast": run.bf16,
        },
        depth=dict(workload.depth),
        measured_depth=depth,
        memory_bytes=memory_bytes(config, device),
        static_bytes=STATES * sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def _read_profile(config: DataCentricArguments, path: Path, *, expected: Profile) -> Profile:
    """The file's profile, of this machine and model; a configured memory limit wins over its."""
    profile = Profile.load(path, machine=expected.machine, model=expected.model)
    if config.memory_limit_mb:
        profile.memory_bytes = expected.memory_bytes
    return profile


def _measure_missing(
    config: DataCentricArguments,
    profile: Profile,
    workload: Workload,
    model: nn.Module,
    group: dist.ProcessGroup,
    device: torch.device,
    save: Callable[[], None],
    *,
    autocast: bool,
) -> None:
    """Measure what the profile lacks of the buckets that occur; ``save`` after every case."""
    num_ranks = dist.get_world_size(group)
    degrees = candidate_degrees(num_ranks) if config.dynamic_sp else [config.sp_size]
    meter = Meter(
        workload,
        group,
        device,
        depth=max(profile.measured_depth.values(), default=None),
        autocast=autocast,
    )
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


def _show(run: TrainingArguments, text: str, *, end: str = "\n") -> None:
    if not run.disable_tqdm:
        print(f"\rprofile: {text}", end=end, file=sys.stderr, flush=True)


def memory_bytes(config: DataCentricArguments, device: torch.device) -> int:
    """What a rank may use: as configured, or a share of its GPU or of the free memory here."""
    if config.memory_limit_mb:
        return config.memory_limit_mb << 20
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        whole = free // local_world_size(1)
    return int(config.alloc_memory_fraction * whole)


def _machine(run: TrainingArguments, num_ranks: int, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": f"{device.type} {name or platform.machine()}",
        "num_ranks": num_ranks,
        "ranks_per_node": local_world_size(num_ranks),
        "threads": torch.get_num_threads(),
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
