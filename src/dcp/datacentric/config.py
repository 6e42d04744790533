"""The configurations of the data-centric jobs: documents, and videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dcp.datacentric.buckets import DISTRIBUTIONS
from dcp.datacentric.clips import SOURCES
from dcp.train.config import Documents, JobConfig, Llama
from dcp.train.keys import Keys, key

PRESETS: dict[str, dict[str, bool]] = {
    "intra": {"dynamic_sp": True},
    "inter": {"dynamic_sp": True, "auto_grad_accumulation": True},
    "inter+PAC": {"dynamic_sp": True, "auto_grad_accumulation": True, "dynamic_recompute": True},
}
_CAPS = ("max_grad_accumulation_steps", "min_grad_accumulation_steps", "max_micro_batches")


@dataclass(frozen=True, kw_only=True)
class DataCentric(Keys):
    """What is chosen anew for every iteration, within which bounds, from which profile.

    A preset switches on the booleans that it stands for, where they are left open (None). Keys that
    the switches leave without effect must keep their defaults.
    """

    preset: str = key("", f"switches to set: {', '.join(PRESETS)}", one_of=("", *PRESETS))
    dynamic_sp: bool | None = key(
        None, "choose the sequence-parallel degree of every group anew (unset: as in the preset)"
    )
    dynamic_recompute: bool | None = key(
        None, "keep activations of layers that memory has room for (unset: as in the preset)"
    )
    auto_grad_accumulation: bool | None = key(
        None, "accumulate more steps in groups that are faster (unset: as in the preset)"
    )
    max_grad_accumulation_steps: int = key(
        3, "longest iteration, in micro-batches of its slowest group", least=1
    )
    min_grad_accumulation_steps: int = key(
        2,
        "micro-batches of the group with most, where samples and the other caps allow it",
        least=1,
    )
    max_micro_batches: int = key(64, "most micro-batches of any group in an iteration", least=1)
    calculate_imbalance: bool = key(False, "log predicted and measured imbalance, and plot it")
    sp_size: int = key(1, "sequence-parallel degree where dynamic_sp is off", least=1)
    max_batch_size: int = key(8, "most samples of a micro-batch that are profiled", least=1)
    profile_path: str = key("", "profile of this model and machine; '' is in the output folder")
    profile_depth: int = key(
        2, "layers of each kind that are profiled, the rest is extrapolated", least=1
    )
    profile_only: bool = key(False, "measure the profile and stop")
    memory_limit_mb: int = key(
        0, "of a rank, MiB; 0 takes alloc_memory_fraction of what there is", least=0
    )
    alloc_memory_fraction: float = key(0.7, "share of a device's memory that may be used", above=0)

    def check(self) -> None:
        super().check()
        fraction = self.alloc_memory_fraction
        self.require("alloc_memory_fraction", fraction <= 1, "above 0 and at most 1")
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.dynamic_sp:
            self.require_default("sp_size", "where dynamic_sp chooses", "switch dynamic_sp off")
        if not self.auto_grad_accumulation:
            for name in _CAPS:
                how = "switch that on, as preset 'inter' does"
                self.require_default(name, "without auto_grad_accumulation", how)


@dataclass(frozen=True, kw_only=True)
class DataCentricConfig(JobConfig, DataCentric):
    """What both data-centric jobs have."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(DataCentricConfig, Llama, Documents):
    """A Llama on variable-length documents, dealt out whole to groups of ranks."""

    job: ClassVar[str] = "data-centric"

    max_seqlen: int = key(4096, "tokens of the longest sequence", least=1)


@dataclass(frozen=True, kw_only=True)
class VideoConfig(DataCentricConfig):
    """A space-time diffusion transformer on latents of many sizes."""

    job: ClassVar[str] = "video"

    video_source: str = key(
        "synthetic", "latents of the video model: synthetic or rendered clips", one_of=SOURCES
    )
    video_samples: int = key(200, "samples of an epoch of the video model", least=1)
    video_distribution: str = key(
        "balanced", f"lengths of videos: {', '.join(DISTRIBUTIONS)}", one_of=DISTRIBUTIONS
    )
