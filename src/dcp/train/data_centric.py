"""The configuration keys of data-centric parallelism (:mod:`dcp.datacentric`)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
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

PLANNED, TEXT, VIDEO = "planned attention", "data-centric documents", "data-centric videos"
DOCUMENTS, DATA_CENTRIC = (PLANNED, TEXT), (TEXT, VIDEO)
_HOW = {  # to get such a job
    PLANNED: "leave out preset, its switches and model",
    TEXT: f"give a preset, one of {', '.join(PRESETS)}",
    VIDEO: "set model to 'video'",
}


def key(default: Any, text: str, jobs: tuple[str, ...] = (PLANNED, TEXT, VIDEO)) -> Any:
    """A field of a configuration: its default, its help, and the jobs in which it does anything."""
    return field(default=default, metadata={"help": text, "jobs": jobs})


@dataclass(frozen=True, kw_only=True)
class DataCentricKeys:
    """What a data-centric job depends on besides the model; part of :class:`TrainConfig`.

    A preset switches on the booleans that it stands for, where they are left open (None). Keys that
    do nothing in the job at hand must keep their defaults.
    """

    model: str = key(
        "llama", "'llama' on documents, or 'video': a space-time diffusion transformer"
    )
    preset: str = key(
        "", f"data-centric parallelism: {', '.join(PRESETS)}; '' is planned attention"
    )
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
        3, "longest iteration, in micro-batches of its slowest group", DATA_CENTRIC
    )
    min_grad_accumulation_steps: int = key(
        2,
        "micro-batches of the group with most, where samples and the other caps allow it",
        DATA_CENTRIC,
    )
    max_micro_batches: int = key(
        64, "most micro-batches of any group in an iteration", DATA_CENTRIC
    )
    calculate_imbalance: bool = key(
        False, "log predicted and measured imbalance, and plot it", DATA_CENTRIC
    )
    sp_size: int = key(1, "sequence-parallel degree where dynamic_sp is off", DATA_CENTRIC)
    max_batch_size: int = key(8, "most samples of a micro-batch that are profiled", DATA_CENTRIC)
    profile_path: str = key(
        "", "profile of this model and machine; '' is in the output folder", DATA_CENTRIC
    )
    profile_depth: int = key(
        2, "layers of each kind that are profiled, the rest is extrapolated", DATA_CENTRIC
    )
    profile_only: bool = key(False, "measure the profile and stop")
    memory_limit_mb: int = key(
        0, "of a rank, MiB; 0 takes alloc_memory_fraction of what there is", DATA_CENTRIC
    )
    alloc_memory_fraction: float = key(
        0.7, "share of a device's memory that may be used", DATA_CENTRIC
    )
    video_source: str = key(
        "synthetic", "latents of the video model: synthetic or rendered clips", (VIDEO,)
    )
    video_samples: int = key(200, "samples of an epoch of the video model", (VIDEO,))
    video_distribution: str = key(
        "balanced", f"lengths of videos: {', '.join(DISTRIBUTIONS)}", (VIDEO,)
    )

    def __post_init__(self) -> None:
        self._one_of("model", MODELS)
        self._one_of("preset", ("", *PRESETS))
        self._one_of("video_source", SOURCES)
        self._one_of("video_distribution", DISTRIBUTIONS)
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in _NOT_WITH.get(self.preset, ()):
            if getattr(self, name):
                raise ValueError(f"config key {name} cannot go with preset {self.preset!r}")
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
        self._refuse_idle_keys()

    def _refuse_idle_keys(self) -> None:
        """What somebody sets has an effect, or is refused."""
        for each in fields(self):
            jobs = each.metadata["jobs"]
            if self.job not in jobs:
                how = " or ".join(_HOW[job] for job in jobs)
                self._require_default(each.name, f"in a job of {self.job}", how)
        if self.dynamic_sp:
            self._require_default("sp_size", "where dynamic_sp chooses", "switch dynamic_sp off")
        if not self.auto_grad_accumulation:
            for name in _CAPS:
                how = "switch that on, as preset 'inter' does"
                self._require_default(name, "without auto_grad_accumulation", how)

    def _require_default(self, name: str, where: str, how: str) -> None:
        value = getattr(self, name)
        if value != self.__dataclass_fields__[name].default:
            raise ValueError(
                f"config key {name}={value!r} has no effect {where}: leave it out, or {how}"
            )

    @property
    def job(self) -> str:
        """The kind of job: ``PLANNED``, ``TEXT`` or ``VIDEO``."""
        if not self.is_data_centric:
            return PLANNED
        return VIDEO if self.model == "video" else TEXT

    @property
    def is_data_centric(self) -> bool:
        """Whether groups are chosen per iteration, instead of attention planned per batch."""
        switched = self.dynamic_sp or self.dynamic_recompute or self.auto_grad_accumulation
        return bool(self.preset or switched or self.profile_only or self.model == "video")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            shown = ", ".join(repr(value) for value in known)
            raise ValueError(
                f"config key {name} must be one of {shown}, got {getattr(self, name)!r}"
            )


_CAPS = ("max_grad_accumulation_steps", "min_grad_accumulation_steps", "max_micro_batches")
_COUNTS = (*_CAPS, "sp_size", "max_batch_size", "profile_depth", "video_samples")
_NOT_WITH = {  # what a preset has no use for
    "bucket": ("dynamic_sp", "auto_grad_accumulation"),
    "packed": ("dynamic_sp", "auto_grad_accumulation"),
    "fixed": ("dynamic_sp",),
}
