"""The data-centric jobs: an iteration is chosen from the samples left, run, and looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from dcp.datacentric.choosers import Chooser, make_chooser
from dcp.datacentric.config import DataCentricArguments
from dcp.datacentric.imbalance import write_imbalance
from dcp.datacentric.iteration import Iteration, imbalance
from dcp.datacentric.profile import Profile
from dcp.datacentric.profiling import job_profile
from dcp.datacentric.schedule import epoch_iterations
from dcp.datacentric.step import IterationRunner
from dcp.datacentric.sums import spread_weights
from dcp.datacentric.text import TextWorkload
from dcp.datacentric.video import VideoWorkload
from dcp.datacentric.workload import Workload
from dcp.integrations.resuming import ExactResume
from dcp.train.record import record_job, say_where

ChooserOf = Callable[[Profile, DataCentricArguments], Chooser]


def train(
    options: dict[str, Any],
    arguments: tuple[Any, ...],
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    chooser_of: ChooserOf = make_chooser,
) -> DataCentricTrainer:
    """Train the job on this rank, or only measure its profile."""
    *_, config, run = arguments
    workload = open_workload(arguments, device)
    trainer = DataCentricTrainer(workload, run, config, group=group, chooser_of=chooser_of)
    if trainer.config.profile_only:
        return trainer
    record_job(trainer, options)
    trainer.train(trainer.args.resume_from_checkpoint)
    folder = Path(str(trainer.args.output_dir))
    trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero() and trainer.config.calculate_imbalance:
        write_imbalance(folder)
    say_where(trainer)
    return trainer


class Iterations:
    """What is trained on: iterations, epoch after epoch. Every rank chooses the same by itself.

    ``seconds`` is how long the last choice took.
    """

    def __init__(self, chooser: Chooser, bucket_of: list[str], num_ranks: int, seed: int) -> None:
        self._chooser, self._bucket_of = chooser, bucket_of
        self._num_ranks, self._seed = num_ranks, seed
        self.epoch = self.position = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[dict[str, Iteration]]:
        while True:
            for iteration in self._rest_of_epoch():
                yield {"iteration": iteration}
            self.epoch, self.position = self.epoch + 1, 0

    def _rest_of_epoch(self) -> Iterator[Iteration]:
        iterations = epoch_iterations(
            self._chooser, self._bucket_of, self._num_ranks, seed=self._seed, epoch=self.epoch
        )
        for _ in range(self.position):
            next(iterations)
        started = time.perf_counter()
        for iteration in iterations:
            self.seconds, self.position = time.perf_counter() - started, self.position + 1
            yield iteration
            started = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def close(self) -> None:
        """Nothing is held."""


class DataCentricTrainer(ExactResume, Trainer):  # type: ignore[misc]  # of its own batches
    """Trainer whose step is an iteration: samples are dealt out whole to groups of ranks.

    Args:
        workload: what is trained. The model that it builds gets the first rank's weights.
        args: Trainer's own.
        config: how iterations are chosen.
        group: all ranks, those of the default group unless given.
        chooser_of: makes the chooser from the profile and ``config``.
    """

    def __init__(
        self,
        workload: Workload,
        args: TrainingArguments,
        config: DataCentricArguments,
        *,
        group: dist.ProcessGroup | None = None,
        chooser_of: ChooserOf = make_chooser,
    ) -> None:
        self.workload, self.config = workload, config
        if args.gradient_accumulation_steps != 1:
            raise ValueError(
                f"--gradient-accumulation-steps {args.gradient_accumulation_steps} has no place in "
                "a data-centric job, whose iterations accumulate as is best: leave it out"
            )
        super().__init__(workload.build().train(), args)
        model: Any = self.model
        device = args.device  # which also joins the default group, where nobody has yet
        group = group or dist.group.WORLD
        assert group is not None
        spread_weights(model, group)
        self.profile = job_profile(config, args, workload, model, group, device)
        self.chooser = chooser_of(self.profile, config)
        self.runner = IterationRunner(workload, model, group, device, autocast=args.bf16)
        self._details: dict[str, Any] = {}
        self._logged = time.perf_counter()

    def get_train_dataloader(self) -> Any:
        ranks = self.runner.num_ranks
        self.begin(Iterations(self.chooser, self.workload.bucket_of, ranks, self.args.seed))
        self._logged = time.perf_counter()
        return self.data

    def _get_num_items_in_batch(self, *args: Any) -> None:
        """Nothing is weighed here: an iteration's loss is a mean already."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Leave the gradient of the iteration's mean loss on every rank, and return that loss."""
        model.train()
        iteration: Iteration = inputs["iteration"]
        loss, busy = self.runner.gradients(iteration, self.data.epoch)
        self._details = self._figures(iteration, busy)
        return torch.tensor(loss, device=self.args.device)

    def details(self) -> dict[str, Any]:
        """What ``metrics.jsonl`` has of the last step besides the log's numbers."""
        return self._details

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        if "loss" in logs and self._details:
            seconds, self._logged = time.perf_counter() - self._logged, time.perf_counter()
            num_tokens = self._details["num_tokens"]
            logs |= {"seconds": seconds, "tokens_per_second": num_tokens / seconds}
            logs |= {k: v for k, v in self._details.items() if isinstance(v, int | float)}
        super().log(logs, *args, **options)

    def _figures(self, iteration: Iteration, busy: list[float]) -> dict[str, Any]:
        figures = {
            "data_epoch": self.data.epoch,
            "num_samples": iteration.num_samples,
            "num_tokens": self.workload.num_tokens(iteration.samples),
            "plan_seconds": self.data.seconds,
            "idle_ranks": iteration.idle_ranks,
            "num_groups": len(iteration.groups),
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


def open_workload(arguments: tuple[Any, ...], device: torch.device) -> Workload:
    """The model and data that the arguments name."""
    *what, _, run = arguments
    dtype = "bfloat16" if run.bf16 else "float32"
    if len(what) == 1:
        return VideoWorkload(what[0], device, seed=run.seed, dtype=dtype)
    model, data = what
    return TextWorkload(model, data, device, seed=run.seed, dtype=dtype)
