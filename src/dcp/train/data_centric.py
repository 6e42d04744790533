"""The configuration keys of data-centric parallelism (:mod:`dcp.datacentric`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PRESETS: dict[str, dict[str, bool]] = {
    "intra": {"dynamic_sp": True},
    "inter": {"dynamic_sp": True, "auto_grad_accumulation": True},
    "inter+PAC": {"dynamic_sp": True, "auto_grad_accumulation": True, "dynamic_recompute": True},
    # the alternatives, to measure against: one degree for all, ``sp_size``
    "bucket": {},
    "packed": {},
    "fixed": {},
}
MODELS, SOURCES = ("llama", "video"), ("synthetic", "rendered")
DISTRIBUTIONS = ("short", "balanced", "long")


def key(default: Any, text: str) -> Any:
    """A field of a configuration: its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DataCentricKeys:
    """What a data-centric job depends on besides the model; part of :class:`TrainConfig`.

    A preset switches on the booleans that it stands for; more may be switched on beside it.
    """

    model: str = key(
        "llama", "'llama' on documents, or 'video': a space-time diffusion transformer"
    )
    preset: str = key(
        "", f"data-centric parallelism: {', '.join(PRESETS)}; '' is planned attention"
    )
    dynamic_sp: bool = key(False, "choose the sequence-parallel degree of every group anew")
    dynamic_recompute: bool = key(False, "keep activations of layers that memory has room for")
    auto_grad_accumulation: bool = key(False, "accumulate more steps in groups that are faster")
    max_grad_accumulation_steps: int = key(
        3, "longest iteration, in micro-batches of its slowest group"
    )
    min_grad_accumulation_steps: int = key(
        2, "micro-batches of the group with most, where samples and the other caps allow it"
    )
    max_micro_batches: int = key(64, "most micro-batches of any group in an iteration")
    calculate_imbalance: bool = key(False, "log predicted and measured imbalance, and plot it")
    sp_size: int = key(1, "sequence-parallel degree where dynamic_sp is off")
    max_batch_size: int = key(8, "most samples of a micro-batch that are profiled")
    profile_path: str = key("", "profile of this model and machine; '' is in the output folder")
    profile_depth: int = key(2, "layers of each kind that are profiled, the rest is extrapolated")
    profile_only: bool = key(False, "measure the profile and stop")
    memory_limit_mb: int = key(0, "of a rank, MiB; 0 takes alloc_memory_fraction of what there is")
    alloc_memory_fraction: float = key(0.7, "share of a device's memory that may be used")
    video_source: str = key("synthetic", "latents of the video model: synthetic or rendered clips")
    video_samples: int = key(200, "samples of an epoch of the video model")
    video_distribution: str = key("balanced", f"lengths of videos: {', '.join(DISTRIBUTIONS)}")

    def __post_init__(self) -> None:
        self._one_of("model", MODELS)
        self._one_of("preset", ("", *PRESETS))
        self._one_of("video_source", SOURCES)
        self._one_of("video_distribution", DISTRIBUTIONS)
        for name in PRESETS.get(self.preset, {}):
            object.__setattr__(self, name, True)
        if self.dynamic_sp and self.preset in ("bucket", "packed", "fixed"):
            raise ValueError(f"config key dynamic_sp cannot go with preset {self.preset!r}")
        if not self.is_data_centric and (self.calculate_imbalance or self.sp_size > 1):
            raise ValueError(
                "config keys calculate_imbalance and sp_size belong to data-centric parallelism: "
                f"give a preset, one of {', '.join(PRESETS)}"
            )
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"config key {name} must be 1 or more, got {getattr(self, name)}")
        if self.memory_limit_mb < 0:
            raise ValueError(
                f"config key memory_limit_mb must be 0 or more, got {self.memory_limit_mb}"
            )
        if not 0 < self.alloc_memory_fraction <= 1:
            raise ValueError(
                "config key alloc_memory_fraction must be above 0 and at most 1, "
                f"got {self.alloc_memory_fraction}"
            )

    @property
    def is_data_centric(self) -> bool:
        """Whether groups are chosen per iteration, instead of attention planned per batch."""
        switched = self.dynamic_sp or self.dynamic_recompute or self.auto_grad_accumulation
        return bool(self.preset) or switched or self.profile_only or self.model == "video"

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            shown = ", ".join(repr(value) for value in known)
            raise ValueError(
                f"config key {name} must be one of {shown}, got {getattr(self, name)!r}"
            )


_COUNTS = (
    "max_grad_accumulation_steps",
    "min_grad_accumulation_steps",
    "max_micro_batches",
    "sp_size",
    "max_batch_size",
    "profile_depth",
    "video_samples",
)
