"""The options of the data-centric jobs, beside those of ``dcp train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dcp.datacentric.buckets import DISTRIBUTIONS
from dcp.datacentric.clips import SOURCES
from dcp.train.arguments import option, require, require_least

PRESETS: dict[str, dict[str, bool]] = {
    "intra": {"dynamic_sp": True},
    "inter": {"dynamic_sp": True, "auto_grad_accumulation": True},
    "inter+PAC": {"dynamic_sp": True, "auto_grad_accumulation": True, "dynamic_recompute": True},
}
_CAPS = ("max_grad_accumulation_steps", "min_grad_accumulation_steps", "max_micro_batches")


@dataclass
class DataCentricArguments:
    """What is chosen anew for every iteration, within which bounds, from which profile.

    A preset switches on the booleans that it stands for, where they are left open (None). Options
    that the switches leave without effect must keep their defaults.
    """

    _argument_group_name = "data-centric"

    preset: str = option("", f"switches to set: {', '.join(PRESETS)}")
    dynamic_sp: bool | None = option(
        None, "choose the sequence-parallel degree of every group anew (unset: as in the preset)"
    )
    dynamic_recompute: bool | None = option(
        None, "keep activations of layers that memory has room for (unset: as in the preset)"
    )
    auto_grad_accumulation: bool | None = option(
        None, "accumulate more steps in groups that are faster (unset: as in the preset)"
    )
    max_grad_accumulation_steps: int = option(
        3, "longest iteration, in micro-batches of its slowest group"
    )
    min_grad_accumulation_steps: int = option(
        2, "micro-batches of the group with most, where samples and the other caps allow it"
    )
    max_micro_batches: int = option(64, "most micro-batches of any group in an iteration")
    calculate_imbalance: bool = option(False, "log predicted and measured imbalance, and plot it")
    sp_size: int = option(1, "sequence-parallel degree where dynamic_sp is off")
    max_batch_size: int = option(8, "most samples of a micro-batch that are profiled")
    profile_path: str = option(
        "",
        "profile of this model and machine, or a folder of profiles that runs share; '' is in the "
        "output folder",
    )
    profile_depth: int = option(
        2, "layers of each kind that are profiled, the rest is extrapolated"
    )
    profile_only: bool = option(False, "measure the profile and stop")
    memory_limit_mb: int = option(
        0, "of a rank, MiB; 0 takes alloc_memory_fraction of what there is"
    )
    alloc_memory_fraction: float = option(0.7, "share of a device's memory that may be used")

    def __post_init__(self) -> None:
        known = ("", *PRESETS)
        require("preset", self.preset, self.preset in known, f"one of {', '.join(PRESETS)}")
        ones = (*_CAPS, "sp_size", "max_batch_size", "profile_depth")
        require_least(self, **dict.fromkeys(ones, 1), memory_limit_mb=0)
        fraction = self.alloc_memory_fraction
        require("alloc_memory_fraction", fraction, 0 < fraction <= 1, "above 0 and at most 1")
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.dynamic_sp:
            self._require_default("sp_size", "where dynamic_sp chooses", "switch dynamic_sp off")
        if not self.auto_grad_accumulation:
            for name in _CAPS:
                how = "switch that on, as preset 'inter' does"
                self._require_default(name, "without auto_grad_accumulation", how)

    def _require_default(self, name: str, where: str, how: str) -> None:
        value: Any = getattr(self, name)
        if value != self.__dataclass_fields__[name].default:
            raise ValueError(
                f"--{name.replace('_', '-')} {value!r} has no effect {where}: leave it out, "
                f"or {how}"
            )


@dataclass
class VideoArguments:
    """A space-time diffusion transformer, and latents of many sizes for it."""

    _argument_group_name = "video model"

    hidden_size: int = option(128, "width of the model")
    num_layers: int = option(4, "layers of each kind")
    num_heads: int = option(4, "attention heads")
    video_source: Literal[SOURCES] = option("synthetic", "latents: synthetic or rendered clips")  # type: ignore[valid-type]
    video_samples: int = option(200, "samples of an epoch")
    video_distribution: Literal[DISTRIBUTIONS] = option("balanced", "lengths of videos")  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        require_least(self, hidden_size=1, num_layers=1, num_heads=1, video_samples=1)
        pairs = self.hidden_size % (2 * self.num_heads) == 0
        wanted = f"a multiple of 2 * num_heads={2 * self.num_heads}"
        require("hidden_size", self.hidden_size, pairs, wanted)
