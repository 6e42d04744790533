"""Hugging Face's Trainer with planned attention: the loop, the schedules, the logs are Trainer's.

::

    planning = PlanningArguments(tokens_per_batch=65536)
    trainer = DCPTrainer(model, args, train_dataset=samples, plan=planning)
    trainer.train()

A batch is one batch of tokens over all ranks, whatever ``per_device_train_batch_size`` says. Each
rank feeds its model one row of its own tokens and, behind them, one stand-in: a rank without tokens
has a row, too, and the label of the last token has a place, for labels are given as Trainer's are,
beside their tokens.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint

from dcp.data import DCPDataLoader, LocalBatch
from dcp.data.samples import IGNORED
from dcp.integrations.sharded import (
    ShardedTrainerMixin,
    compute_dtype,
    pipeline_size,
    token_group,
)
from dcp.integrations.trainer_batches import (
    LOADER_STATE,
    Evaluated,
    PlannedBatches,
    PlanningArguments,
    by_sequence,
    masks_of,
    read_state,
)
from dcp.integrations.transformers import attention_of, planned_forward, register_attention
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor

__all__ = ["DCPTrainer", "PlannedTrainerMixin", "PlanningArguments"]


class PlannedTrainerMixin(ShardedTrainerMixin):
    """What makes a Trainer plan its attention; put it before any kin of ``transformers.Trainer``.

    Args:
        plan: how, see :class:`PlanningArguments`.
        peft_config: adapters to train instead of the model, see ``peft.get_peft_model``.

    Raises ``ValueError`` for arguments that would have no effect or a wrong one.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *others: Any,
        plan: PlanningArguments, peft_config: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        if options.get("data_collator") is not None:
            raise ValueError("data_collator has no part in planned batches: prepare the samples")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        super().__init__(model, args, *others, **options)
        self.plan = plan
        self._check_arguments()
        self.args.ignore_data_skip = True  # the loader goes on by its own state
        self.group = token_group(tensor_parallel=self.get_tp_size())
        self.executor = AttentionExecutor(self.group)
        self._loader: DCPDataLoader | None = None
        self._resume_from: str | None = None
        self._seen: list[tuple[LocalBatch, RankPlan]] = []  # since the last line of the log
        self._evaluated = Evaluated()

    def _check_arguments(self) -> None:
        args = self.args
        refused = {
            "more than one GPU a process": args.n_gpu > 1,
            "auto_find_batch_size": args.auto_find_batch_size,
            "average_tokens_across_devices=False": not args.average_tokens_across_devices,
            "batch_eval_metrics": args.batch_eval_metrics,
            "pipeline parallelism": pipeline_size(self.model) > 1,
            "a context-parallel degree": self.get_cp_size() > 1 or self.get_sp_size() > 1,
        }
        for what, holds in refused.items():
            if holds:
                raise ValueError(
                    f"{what} does not go with planned attention: start one process per device with "
                    "torchrun, leave the argument out, and say tokens_per_batch=… instead"
                )
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if args.world_size != ranks:
            raise ValueError(
                f"accelerate trains with {args.world_size} processes, the group has {ranks}: "
                "each would train a model of its own; on the CPU, give use_cpu=True"
            )
        if args.fsdp and not self._is_sharded:
            raise ValueError(
                f"accelerate leaves fsdp={args.fsdp!r} out here (it runs as "
                f"{self.accelerator.distributed_type}), as it does on CPUs: leave it out, too"
            )
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            raise ValueError(
                f"{type(self.model).__name__} takes no num_items_in_batch, so that its loss would "
                "be a rank's mean: give compute_loss_func=fn(outputs, labels, num_items_in_batch)"
            )

    # ------------------------------------------------------------------ data

    def _open_loader(self, dataset: Any, *, tokens_per_batch: int, seed: int | None) -> Any:
        plan = self.plan
        register_attention()
        self.model.set_attn_implementation("dcp")
        dtype = compute_dtype(self.args, self.model)
        self.attention = attention_of(self.model, dtype=dtype, tensor_parallel=self.get_tp_size())
        config = self.model.config.get_text_config()
        return DCPDataLoader(
            dataset,
            masks_of(self.attention) if plan.mask is None else plan.mask,
            spec=self.attention.spec,
            mask_weights=self.attention.weights if plan.mask is None else None,
            tokens_per_batch=tokens_per_batch,
            group=dist.group.WORLD if dist.is_initialized() else None,
            attention_group=self.group,
            cluster=plan.cluster,
            seed=seed,
            look_ahead=plan.look_ahead,
            num_workers=plan.num_workers,
            device=self.args.device,
            plan_options={
                "strategy": plan.strategy,
                "block_size": plan.block_size,
                "model_width": config.hidden_size,
                **plan.plan_options,
            },
            **plan.loader_options,
        )

    def get_train_dataloader(self) -> PlannedBatches:
        """Batches of ``train_dataset``, from where the checkpoint stood that training resumes."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        self.close()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        tokens = self.plan.tokens_per_batch
        self._loader = self._open_loader(self.train_dataset, tokens_per_batch=tokens, seed=seed)
        if self._resume_from is not None:
            self._loader.load_state_dict(read_state(Path(self._resume_from)))
        return PlannedBatches(self._loader, self.executor, self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PlannedBatches:
        """Batches of an evaluation dataset, each token once."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        tokens = self.plan.eval_tokens_per_batch or self.plan.tokens_per_batch
        loader = self._open_loader(dataset, tokens_per_batch=tokens, seed=None)
        return PlannedBatches(loader, self.executor, dataset)

    get_test_dataloader = get_eval_dataloader

    def close(self) -> None:
        """End the planning processes."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    # ------------------------------------------------------------------ steps and loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> torch.Tensor:
        """Labels of all ranks, over which the loss of an optimiser step is a mean."""
        count = sum(inputs["dcp_batch"].num_loss_tokens for inputs in batch_samples)
        return torch.tensor(max(count, 1), device=device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Trainer's own, of a model whose attention is that of the batch's plan."""
        batch, bound = inputs["dcp_batch"], inputs["dcp_plan"]
        if model.training:
            self._seen.append((batch, bound.plan))
        keywords = {"dcp_any_mask": True} if self.plan.mask is not None else self.attention.keywords
        own = {name: x for name, x in inputs.items() if name not in ("dcp_batch", "dcp_plan")}
        with planned_forward(model, bound) as planned:
            every = {**own, **planned, **keywords, "dcp_stand_ins": 1, "use_cache": False}
            return super().compute_loss(model, every, *args, **options)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """Trainer's, with as many steps as the epochs really have: they differ by some batches."""
        values = list(super().set_initial_training_values(args, dataloader))
        if args.max_steps < 0:
            counts = dataloader.loader.count_batches(ceil(args.num_train_epochs))
            steps = [ceil(count / args.gradient_accumulation_steps) for count in counts]
            part = args.num_train_epochs - (len(steps) - 1)
            values[-1] = sum(steps[:-1]) + ceil(part * steps[-1])
        return tuple(values)

    def _init_training_state(self, *args: Any, **options: Any) -> tuple[int, int]:
        epochs, _ = super()._init_training_state(*args, **options)
        assert self._loader is not None
        return (epochs if self._resume_from is None else self._loader.state_dict()["epoch"]), 0

    def _run_epoch(self, **options: Any) -> Any:
        loader = options["train_dataloader"].loader
        try:
            left = len(loader) - loader.state_dict()["position"]
        except TypeError:  # of a stream
            return super()._run_epoch(**options)
        every = self.args.gradient_accumulation_steps
        options |= {"steps_in_epoch": left, "num_update_steps_per_epoch": ceil(left / every)}
        return super()._run_epoch(**options)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Trainer's; going on from a checkpoint is exact to the batch, on any number of ranks."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no checkpoint to resume in {self.args.output_dir!r}")
        self._resume_from = resume_from_checkpoint or None
        try:
            return super().train(self._resume_from, *args, **options)
        finally:
            self._resume_from = None
            self.close()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial=trial)) / name
            folder.mkdir(parents=True, exist_ok=True)
            assert self._loader is not None
            (folder / LOADER_STATE).write_text(json.dumps(self._loader.state_dict()))
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Trainer's lines, with what planning did since the last one: means over batches."""
        if "loss" in logs and self._seen:
            batches, plans = zip(*self._seen, strict=True)
            stats = [plan.stats for plan in plans]
            moved = [each.inter_node_bytes + each.intra_node_bytes for each in stats]
            groups = self.get_tp_size()  # each moves a share of the heads
            logs |= {
                "num_tokens": float(sum(batch.num_tokens for batch in batches)),
                "compute_balance": float(np.mean([each.compute_balance for each in stats])),
                "token_balance": float(np.mean([each.token_balance for each in stats])),
                "attention_bytes": float(np.mean(moved) * groups),
                "plan_wait_seconds": float(np.mean([b.plan_wait_seconds for b in batches])),
            }
            self._seen.clear()
        super().log(logs, *args, **options)

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        dataloader: PlannedBatches,
        *args: Any,
        metric_key_prefix: str = "eval",
        **options: Any,
    ) -> EvalLoopOutput:
        """Trainer's; the loss is the mean over all labels, predictions are those of the samples in
        the dataset's order, ``[samples, longest, vocab]``, the same on every rank."""
        self._evaluated = Evaluated()
        with ExitStack() as stack:
            stack.callback(dataloader.loader.close)
            self.gather_function = lambda tensor: tensor  # every rank has all of them
            found = super().evaluation_loop(
                dataloader, *args, metric_key_prefix=metric_key_prefix, **options
            )
        metrics, key = dict(found.metrics or {}), f"{metric_key_prefix}_loss"
        if key in metrics:
            metrics[key] = self._evaluated.mean_loss(self.group, self.args.device)
        order = self._evaluated.order()
        predictions: Any = None if found.predictions is None else found.predictions[order]
        labels: Any = None if found.label_ids is None else found.label_ids[order]
        return EvalLoopOutput(predictions, labels, metrics, len(dataloader.dataset))

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *args: Any,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """Trainer's, with the batch's sequences in place of this rank's rows."""
        batch = inputs["dcp_batch"]
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, *args, **options
        )
        ranks = dist.get_world_size(self.group) if self.group is not None else 1
        self._evaluated.add(batch, loss / ranks)
        if logits is None or labels is None:
            return loss, None, None
        rows = by_sequence(batch, logits[0, :-1].float(), self.group)
        shown = by_sequence(batch, labels[0, 1:], self.group)
        return loss, rows, torch.nn.functional.pad(shown, (1, 0), value=IGNORED)[:, :-1]


class DCPTrainer(PlannedTrainerMixin, Trainer):  # type: ignore[misc]  # of its own loaders
    """``transformers.Trainer`` with planned attention, see :class:`PlannedTrainerMixin`."""
