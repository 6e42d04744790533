"""The training loop of data-centric parallelism: an iteration is planned, run, and looked at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcp.datacentric.iteration import Iteration, imbalance
from dcp.datacentric.journal import ImbalanceJournal
from dcp.datacentric.planners import make_planner
from dcp.datacentric.profiling import job_profile
from dcp.datacentric.schedule import epoch_iterations
from dcp.datacentric.step import IterationRunner
from dcp.datacentric.video import VideoWorkload
from dcp.datacentric.workload import Workload
from dcp.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from dcp.train.config import TrainConfig
from dcp.train.model import build_optimizer, learning_rate


class DataCentricTrainer:
    """One rank's side of a job. Weights are the same on all ranks; samples are dealt out in groups.

    Args:
        config: the job; see :class:`dcp.train.data_centric.DataCentricKeys`.
        group: the ranks, one process each.
        device: where this rank computes.
    """

    def __init__(
        self, config: TrainConfig, group: dist.ProcessGroup, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.group, self.device = config, group, torch.device(device)
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.workload = open_workload(config, self.device)
        self.model = self.workload.build().train()
        for parameter in self.model.parameters():
            dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)
        self.profile = job_profile(config, self.workload, self.model, group, self.device)
        self.optimizer = build_optimizer(self.model, config)
        self.runner = IterationRunner(
            self.workload, self.model, group, self.device, autocast=config.dtype == "bfloat16"
        )
        self.planner = make_planner(self.profile, self.workload.buckets, config)
        self.step = self.epoch = self.position = 0
        if config.resume:
            self._resume(find_checkpoint(config.resume, Path(config.output)))
        self.journal = ImbalanceJournal(config, first_step=self.step) if self.rank == 0 else None

    def __enter__(self) -> DataCentricTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.journal:
            self.journal.close()

    def train(self) -> list[float]:
        """Train to ``config.steps``; returns the loss of each step that was run here."""
        losses: list[float] = []
        while self.step < self.config.steps and not self.config.profile_only:
            for planned, plan_seconds in self._iterations():
                losses.append(self._train_step(planned, plan_seconds))
                every = self.config.checkpoint_every
                if self.step == self.config.steps or (every and self.step % every == 0):
                    self.save()
                if self.step == self.config.steps:
                    return losses
            self.epoch, self.position = self.epoch + 1, 0
        return losses

    def save(self) -> None:
        """Write a checkpoint, from the first rank."""
        if self.rank == 0:
            folder = Path(self.config.output) / "checkpoints" / f"step-{self.step:08d}"
            state = {
                "step": self.step,
                "epoch": self.epoch,
                "position": self.position,
                "config": self.config.to_json(),
            }
            save_checkpoint(folder, self.model, self.optimizer, state)

    def _iterations(self) -> Iterator[tuple[Iteration, float]]:
        """The rest of the epoch, and the seconds that planning each took."""
        iterations = epoch_iterations(
            self.planner,
            self.workload.bucket_of,
            self.num_ranks,
            seed=self.config.seed,
            epoch=self.epoch,
        )
        for _ in range(self.position):
            next(iterations)
        while True:
            started = time.perf_counter()
            planned = next(iterations, None)
            if planned is None:
                return
            yield planned, time.perf_counter() - started

    def _train_step(self, planned: Iteration, plan_seconds: float) -> float:
        started = time.perf_counter()
        loss, busy = self.runner.gradients(planned, self.epoch)
        limit = self.config.grad_clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.position += 1
        seconds = time.perf_counter() - started + plan_seconds
        if self.journal:
            figures = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
            figures |= {"seconds": seconds, "plan_seconds": plan_seconds}
            self.journal.step(figures | self._metrics(planned, busy, seconds))
        return loss

    def _metrics(self, planned: Iteration, busy: list[float], seconds: float) -> dict[str, Any]:
        num_tokens = self.workload.num_tokens(planned.samples)
        figures = {
            "step": self.step - 1,
            "epoch": self.epoch,
            "num_samples": planned.num_samples,
            "num_tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "idle_ranks": planned.idle_ranks,
            "groups": [
                {
                    "degree": group.degree,
                    "micro_batches": [[b.bucket, b.batch_size] for b in group.micro_batches],
                    "keep": [dict(b.keep) for b in group.micro_batches],
                }
                for group in planned.groups
            ],
        }
        if self.config.calculate_imbalance:
            predicted = planned.rank_seconds().tolist()
            figures |= {"predicted_rank_seconds": predicted, "measured_rank_seconds": busy}
            figures |= {"predicted_imbalance": imbalance(predicted)}
            figures |= {"measured_imbalance": imbalance(busy)}
        return figures

    def _resume(self, folder: Path) -> None:
        state = load_checkpoint(folder, self.model, self.optimizer)
        self.step, self.epoch, self.position = (state[k] for k in ("step", "epoch", "position"))
        if self.step >= self.config.steps:
            raise ValueError(
                f"{folder} is already at step {self.step} of steps={self.config.steps}"
            )


def open_workload(config: TrainConfig, device: torch.device) -> Workload:
    """The model and data that the configuration names."""
    if config.model == "video":
        return VideoWorkload(config, device)
    from dcp.datacentric.text import TextWorkload  # transformers takes seconds to import

    return TextWorkload(config, device)
