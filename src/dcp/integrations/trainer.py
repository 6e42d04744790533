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

import time
from contextlib import ExitStack
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from dcp.cluster import Cluster
from dcp.data import DCPDataLoader, LocalBatch
from dcp.data.samples import IGNORED
from dcp.integrations.resuming import ExactResume
from dcp.integrations.sharded import (
    ShardedTrainerMixin,
    compute_dtype,
    pipeline_size,
    token_group,
)
from dcp.integrations.trainer_batches import (
    Evaluated,
    PlannedBatches,
    PlanningArguments,
    by_sequence,
    figures_of,
    masks_of,
    over_ranks,
    rank_figures,
)
from dcp.integrations.transformers import attention_of, planned_forward, register_attention
from dcp.program import RankPlan
from dcp.rates import RateFit
from dcp.runtime import AttentionExecutor
from dcp.runtime.executor import BoundPlan

__all__ = ["DCPTrainer", "PlannedTrainerMixin", "PlanningArguments"]


class PlannedTrainerMixin(ShardedTrainerMixin, ExactResume):
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
            raise ValueError(
                "data_collator has no part in planned batches: leave it out, prepare the samples"
            )
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        super().__init__(model, args, *others, **options)
        self.plan = plan
        self._check_arguments()
        self.group = token_group(tensor_parallel=self.get_tp_size())
        self.executor = AttentionExecutor(self.group)
        self._seen: list[tuple[LocalBatch, RankPlan]] = []  # since the last line of the log
        self._logged = 0.0
        self._strategy = ""
        self.rates: RateFit | None = None  # on planning ranks, what training learns of the cluster
        self._evaluated = Evaluated()
        #: Figures of every rank at the last line of the log, see :func:`rank_figures`.
        self.rank_figures: dict[str, list[float]] = {}

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
        self.executor.kernel = (plan.cluster or Cluster()).kernel_for(self.attention.spec)
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
            plan_options=self.plan_options,
            **plan.loader_options,
        )

    @property
    def plan_options(self) -> dict[str, Any]:
        """Keywords of :func:`dcp.plan` for every batch."""
        return {
            "strategy": self.plan.strategy,
            "block_size": self.plan.block_size,
            "model_width": self.model.config.get_text_config().hidden_size,
            **self.plan.plan_options,
        }

    def get_train_dataloader(self) -> PlannedBatches:
        """Batches of ``train_dataset``, from where the checkpoint stood that training resumes."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        tokens = self.plan.tokens_per_batch
        loader = self._open_loader(self.train_dataset, tokens_per_batch=tokens, seed=seed)
        if self._learns:
            loader.learn_from(self.executor)
        self.rates = loader.rates
        self.begin(loader)
        self._logged = time.perf_counter()
        return PlannedBatches(self.data, self.executor, self.train_dataset)

    @property
    def _learns(self) -> bool:
        """Whether rates are learnt: only where there is a choice of plans, and ranks to choose."""
        chooses = self.plan.strategy == "auto" and self.executor.num_ranks > 1
        return self.plan.calibrate and chooses and not self.args.full_determinism

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

    # ------------------------------------------------------------------ steps and loss

    def num_items(self, batch: LocalBatch) -> int:
        """Of a batch, over all ranks, what the loss of an optimiser step is a mean over: labels."""
        return batch.num_loss_tokens

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> torch.Tensor:
        count = sum(self.num_items(inputs["dcp_batch"]) for inputs in batch_samples)
        return torch.tensor(max(count, 1), device=device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Trainer's own, of a model whose attention is that of the batch's plan."""
        batch, bound = inputs["dcp_batch"], inputs["dcp_plan"]
        self._note(model, batch, bound)
        keywords = {"dcp_any_mask": True} if self.plan.mask is not None else self.attention.keywords
        own = {name: x for name, x in inputs.items() if name not in ("dcp_batch", "dcp_plan")}
        with planned_forward(model, bound) as planned:
            every = {**own, **planned, **keywords, "dcp_stand_ins": 1, "use_cache": False}
            return super().compute_loss(model, every, *args, **options)

    def _note(self, model: Any, batch: LocalBatch, bound: BoundPlan) -> None:
        if model.training:
            self._seen.append((batch, bound.plan))

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """Trainer's, with as many steps as the epochs really have: they differ by some batches."""
        values = list(super().set_initial_training_values(args, dataloader))
        if args.max_steps < 0:
            counts = dataloader.loader.count_batches(ceil(args.num_train_epochs))
            steps = [ceil(count / args.gradient_accumulation_steps) for count in counts]
            part = args.num_train_epochs - (len(steps) - 1)
            values[-1] = sum(steps[:-1]) + ceil(part * steps[-1])
        return tuple(values)

    def _run_epoch(self, **options: Any) -> Any:
        loader = options["train_dataloader"].loader
        try:
            left = len(loader) - loader.state_dict()["position"]
        except TypeError:  # of a stream
            return super()._run_epoch(**options)
        every = self.args.gradient_accumulation_steps
        options |= {"steps_in_epoch": left, "num_update_steps_per_epoch": ceil(left / every)}
        return super()._run_epoch(**options)

    def details(self) -> dict[str, Any]:
        """What there is to say of the last step besides the log's numbers."""
        return {"strategy": self._strategy}

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """Trainer's, in which all ranks are together where a line is due."""
        if self.control.should_log and self._seen:
            waits = [batch.plan_wait_seconds for batch, _ in self._seen]
            self.rank_figures = rank_figures(
                self.args.device,
                plan_wait_seconds=sum(waits) / len(waits),
                attention_wait_share=getattr(self.data, "attention_wait_share", None),
            )
        super()._maybe_log_save_evaluate(*args, **options)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Trainer's lines, with what planning did since the last one."""
        if "loss" in logs and self._seen:
            seconds, self._logged = time.perf_counter() - self._logged, time.perf_counter()
            layers = 1 if self.plan.mask is None else sum(self.attention.weights.values())
            repeated = layers * self.get_tp_size()  # each of these moves a share of the heads
            logs |= figures_of(self._seen, seconds, repeated=repeated)
            self._strategy = self._seen[-1][1].stats.strategy
            if (ratio := getattr(self.data, "predicted_over_measured", None)) is not None:
                logs["predicted_over_measured"] = ratio
            if (budget := getattr(self.data, "time_budget", None)) is not None:
                logs["plan_time_budget"] = budget
            logs |= over_ranks(self.rank_figures)
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
        self._evaluated, began = Evaluated(), time.perf_counter()
        with ExitStack() as stack:
            stack.callback(dataloader.loader.close)
            self.gather_function = lambda tensor: tensor  # every rank has all of them
            found = super().evaluation_loop(
                dataloader, *args, metric_key_prefix=metric_key_prefix, **options
            )
        self._logged += time.perf_counter() - began  # the next step's seconds are its own
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
        self._evaluated.add(batch, loss / ranks, self.num_items(batch))
        if logits is None or labels is None:
            return loss, None, None
        rows = by_sequence(batch, logits[0, :-1].float(), self.group)
        shown = by_sequence(batch, labels[0, 1:], self.group)
        return loss, rows, torch.nn.functional.pad(shown, (1, 0), value=IGNORED)[:, :-1]


class DCPTrainer(PlannedTrainerMixin, Trainer):  # type: ignore[misc]  # of its own loaders
    """``transformers.Trainer`` with planned attention, see :class:`PlannedTrainerMixin`."""
