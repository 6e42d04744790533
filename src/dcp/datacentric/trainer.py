"""The data-centric jobs: an iteration is chosen from the samples left, run, and looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from dcp.datacentric.choosers import Chooser, make_chooser
from dcp.datacentric.config import DataCentricConfig, TextConfig, VideoConfig
from dcp.datacentric.imbalance import write_imbalance
from dcp.datacentric.iteration import Iteration, imbalance
from dcp.datacentric.profile import Profile
from dcp.datacentric.profiling import job_profile
from dcp.datacentric.schedule import epoch_iterations
from dcp.datacentric.step import IterationRunner
from dcp.datacentric.video import VideoWorkload
from dcp.datacentric.workload import Workload
from dcp.train.loop import TrainingLoop


class DataCentricTrainer(TrainingLoop[DataCentricConfig, Iteration]):
    """One rank's side of a data-centric job. Samples are dealt out whole to groups of ranks.

    Args:
        config, group, device: as :class:`TrainingLoop`.
        chooser_of: makes the chooser from the profile and the configuration.
    """

    def __init__(
        self,
        config: TextConfig | VideoConfig,
        group: dist.ProcessGroup,
        device: torch.device | str = "cpu",
        *,
        chooser_of: Callable[[Profile, DataCentricConfig], Chooser] = make_chooser,
    ) -> None:
        device = torch.device(device)
        self.workload = open_workload(config, device)
        super().__init__(config, group, device, self.workload.build().train())
        self.profile = job_profile(config, self.workload, self.model, group, device)
        self.chooser = chooser_of(self.profile, config)
        self.runner = IterationRunner(
            self.workload, self.model, group, device, autocast=config.dtype == "bfloat16"
        )
        self.epoch = self.done = 0  # iterations of the epoch
        self._choice_seconds = 0.0

    def close(self) -> None:
        if self.journal and self.config.calculate_imbalance:
            write_imbalance(self.journal.folder)

    def batches(self) -> Iterator[Iteration]:
        while not self.config.profile_only:
            yield from self._rest_of_epoch()
            self.epoch, self.done = self.epoch + 1, 0

    def _rest_of_epoch(self) -> Iterator[Iteration]:
        """What is left of it. Every rank chooses for itself, and the same."""
        iterations = epoch_iterations(
            self.chooser,
            self.workload.bucket_of,
            self.num_ranks,
            seed=self.config.seed,
            epoch=self.epoch,
        )
        for _ in range(self.done):
            next(iterations)
        started = time.perf_counter()
        for iteration in iterations:
            self._choice_seconds = time.perf_counter() - started
            yield iteration
            started = time.perf_counter()

    def gradients(self, batch: Iteration) -> tuple[float, dict[str, Any]]:
        loss, busy = self.runner.gradients(batch, self.epoch)
        self.done += 1
        return loss, self._figures(batch, busy)

    def _figures(self, iteration: Iteration, busy: list[float]) -> dict[str, Any]:
        figures = {
            "epoch": self.epoch,
            "num_samples": iteration.num_samples,
            "num_tokens": self.workload.num_tokens(iteration.samples),
            "plan_seconds": self._choice_seconds,
            "idle_ranks": iteration.idle_ranks,
            "groups": [
                {
                    "degree": group.degree,
                    "micro_batches": [[b.bucket, b.batch_size] for b in group.micro_batches],
                    "keep": [dict(b.keep) for b in group.micro_batches],
                }
                for group in iteration.groups
            ],
        }
        if self.config.calculate_imbalance:
            predicted = iteration.rank_seconds().tolist()
            figures |= {"predicted_rank_seconds": predicted, "measured_rank_seconds": busy}
            figures |= {"predicted_imbalance": imbalance(predicted)}
            figures |= {"measured_imbalance": imbalance(busy)}
        return figures

    def describe(self, metrics: dict[str, Any]) -> str:
        degrees = "+".join(str(group["degree"]) for group in metrics["groups"])
        text = f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
        text += f"groups {degrees}"
        if "measured_imbalance" in metrics:
            text += f", imbalance {metrics['measured_imbalance']:.0%}"
            text += f" ({metrics['predicted_imbalance']:.0%} predicted)"
        return text

    def position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.done}

    def go_to(self, position: dict[str, Any]) -> None:
        self.epoch, self.done = position["epoch"], position["position"]


def open_workload(config: TextConfig | VideoConfig, device: torch.device) -> Workload:
    """The model and data that the configuration names."""
    if isinstance(config, VideoConfig):
        return VideoWorkload(config, device)
    from dcp.datacentric.text import TextWorkload  # transformers takes seconds to import

    return TextWorkload(config, device)
