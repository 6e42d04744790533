"""The training loop that all jobs share: step, clip, schedule, checkpoint, resume, journal."""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dcp.train.checkpoint import STATE, find_checkpoint, load_checkpoint, save_checkpoint
from dcp.train.config import JobConfig
from dcp.train.journal import Journal
from dcp.train.model import build_optimizer, learning_rate

Config = TypeVar("Config", bound=JobConfig)
Batch = TypeVar("Batch")


class TrainingLoop(ABC, Generic[Config, Batch]):
    """One rank's side of a job. Weights are the same on all ranks.

    A kind of job says what a step is of (:meth:`batches`), how its gradients come about
    (:meth:`gradients`), and where in the data it is (:meth:`position`, :meth:`go_to`). To be used
    as a context, which resumes and keeps the journal.

    Args:
        config: the job.
        group: the ranks, one process each.
        device: where this rank computes.
        model: this rank's; the first rank's weights are everybody's.
    """

    def __init__(
        self, config: Config, group: dist.ProcessGroup, device: torch.device, model: nn.Module
    ) -> None:
        self.config, self.group, self.device, self.model = config, group, device, model
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)
        self.optimizer = build_optimizer(model, config)
        self.journal: Journal | None = None
        self.step = 0

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """What is trained on from the present position, a step each, epoch after epoch."""

    @abstractmethod
    def gradients(self, batch: Batch) -> tuple[float, dict[str, Any]]:
        """Leave the gradient of the mean loss over all ranks with the weights of every rank.

        Returns that loss and the step's figures for the journal, ``num_tokens`` among them.
        """

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """Where in the data the job is, for a checkpoint."""

    @abstractmethod
    def go_to(self, position: dict[str, Any]) -> None:
        """Go on where :meth:`position` was asked."""

    @abstractmethod
    def describe(self, metrics: dict[str, Any]) -> str:
        """What the progress bar says about a step."""

    def close(self) -> None:
        """Let go of what the job holds besides the journal."""

    def __enter__(self) -> Self:
        if self.config.resume:
            folder = find_checkpoint(self.config.resume, Path(self.config.output))
            self._check_same(folder)
            if folder is not None:
                self._resume(folder)
        if self.rank == 0:
            self.journal = Journal(self.config, first_step=self.step, describe=self.describe)
        return self

    def __exit__(self, *_: object) -> None:
        if self.journal:
            self.journal.close()
        self.close()

    def train(self) -> list[float]:
        """Train to ``config.steps``; returns the loss of each step that was run here."""
        losses: list[float] = []
        self.model.train()
        every = self.config.checkpoint_every
        started = time.perf_counter()
        if self.step >= self.config.steps:  # a job that had ended was started again
            return losses
        for batch in self.batches():
            loss, metrics = self._train_step(batch)
            losses.append(loss)
            seconds, started = time.perf_counter() - started, time.perf_counter()
            if self.journal:
                rate = {"seconds": seconds, "tokens_per_second": metrics["num_tokens"] / seconds}
                self.journal.step(metrics | rate)
            if self.step == self.config.steps or (every and self.step % every == 0):
                self.save()
            if self.step == self.config.steps:
                break
        return losses

    def save(self) -> None:
        """Write a checkpoint, from the first rank."""
        if self.rank == 0:
            folder = Path(self.config.output) / "checkpoints" / f"step-{self.step:08d}"
            state = {"step": self.step, **self.position(), "config": self.config.to_json()}
            save_checkpoint(folder, self.model, self.optimizer, state)

    def _train_step(self, batch: Batch) -> tuple[float, dict[str, Any]]:
        """The loss, and the metrics that do not depend on the clock."""
        loss, figures = self.gradients(batch)
        # equal on all ranks by now, and so is its norm
        limit = self.config.grad_clip or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        known = {"step": self.step, "loss": loss, "gradient_norm": norm, "learning_rate": rate}
        self.step += 1
        return loss, known | figures

    def _resume(self, folder: Path) -> None:
        state = load_checkpoint(folder, self.model, self.optimizer)
        self.config.require_same(state.get("config"), str(folder / STATE))
        self.step = state["step"]
        try:
            self.go_to(state)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / STATE}: {error}") from None
        if self.step >= self.config.steps and self.config.resume != "auto":
            raise ValueError(
                f"{folder} is already at step {self.step} of steps={self.config.steps}"
            )

    def _check_same(self, folder: Path | None) -> None:
        """All ranks found a checkpoint of one name, or none; collective."""
        number = zlib.crc32(folder.name.encode()) if folder else -1
        ends = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MIN, group=self.group)
        if int(ends.sum()) != 0:
            raise ValueError(
                f"resume={self.config.resume!r}: rank {self.rank} found {folder}, others do not: "
                f"all ranks need the same {self.config.output}/checkpoints"
            )
