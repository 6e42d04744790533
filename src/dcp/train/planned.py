"""The planned job: any causal language model on any documents, its attention planned per batch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import set_seed
from transformers.trainer_callback import TrainerCallback

from dcp.cluster import PRESETS, Cluster
from dcp.data import DCPDataLoader
from dcp.integrations.trainer import DCPTrainer
from dcp.launch.environment import local_world_size
from dcp.planner import plan
from dcp.report.plan_page import write_plan_page
from dcp.train.arguments import BatchArguments, DataArguments, ModelArguments, RunArguments
from dcp.train.model import (
    config_of,
    has_experts,
    lora_config,
    open_model,
    open_samples,
    tokenizer_of,
)
from dcp.train.record import record_job, say_where

PLAN_PAGE = "plan.html"
CLUSTER = "cluster.json"
Arguments = tuple[ModelArguments, DataArguments, BatchArguments, RunArguments]


def train(
    options: dict[str, Any], arguments: Arguments, group: dist.ProcessGroup, device: torch.device
) -> DCPTrainer:
    """Train the job on this rank, and leave the model, its metrics and a picture of a plan."""
    trainer = open_trainer(options, arguments, group, device)
    trainer.train(trainer.args.resume_from_checkpoint)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    save(trainer)
    if trainer.rates is not None and trainer.args.should_save:
        learnt = replace(trainer.rates.cluster, name="learnt", rank_speeds=())
        learnt.save(Path(str(trainer.args.output_dir)) / CLUSTER)
    say_where(trainer, adapter="adapter", plan=PLAN_PAGE, cluster=CLUSTER)
    return trainer


def open_trainer(
    options: dict[str, Any], arguments: Arguments, group: dist.ProcessGroup, device: torch.device
) -> DCPTrainer:
    """The trainer of a job; its steps are recorded in the output folder."""
    model_options, data, batches, run = arguments
    set_seed(run.seed)
    tokenizer = tokenizer_of(model_options)
    longest = data.max_seqlen or batches.tokens_per_batch
    config = config_of(model_options, tokenizer=tokenizer, max_positions=longest)
    cluster = make_cluster(batches.cluster, dist.get_world_size(group), device)
    if run.ddp_find_unused_parameters is None:  # a rank's tokens may leave experts unused
        run.ddp_find_unused_parameters = has_experts(config)
    planning = batches.planning(data, cluster)
    planning.loader_options["timeout_seconds"] = float(run.ddp_timeout)
    planning.loader_options["vocab_size"] = config.get_text_config().vocab_size
    trainer = DCPTrainer(
        open_model(model_options, config),
        run,
        train_dataset=open_samples(data.data, data, tokenizer),
        eval_dataset=open_samples(data.eval_data, data, tokenizer) if data.eval_data else None,
        processing_class=tokenizer.for_transformers(),
        peft_config=lora_config(model_options),
        plan=planning,
    )
    record_job(trainer, options)
    trainer.add_callback(PlanDrawer(trainer))
    return trainer


def save(trainer: DCPTrainer) -> None:
    """The trained model as a folder that ``from_pretrained`` loads; adapters merged, and alone."""
    folder = Path(str(trainer.args.output_dir))
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        trainer.save_model(str(folder / "model"))
        return
    trainer.save_model(str(folder / "adapter"))
    if trainer.args.should_save:
        model.merge_and_unload().save_pretrained(folder / "model")
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(folder / "model")


class PlanDrawer(TrainerCallback):
    """Draws the plan of the first batch (the planner repeats itself)."""

    def __init__(self, trainer: DCPTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        loader: DCPDataLoader = kwargs["train_dataloader"].loader
        if not (state.is_world_process_zero and loader.plans):
            return
        place = loader.state_dict()
        with suppress(ValueError):  # which the loader will raise on all ranks, not just here
            batch = loader.sequence_batch(place["epoch"], place["position"])
            made = plan(batch, loader.spec, loader.cluster, **trainer.plan_options)
            write_plan_page(made, Path(args.output_dir) / PLAN_PAGE)


def make_cluster(name: str, num_ranks: int, device: torch.device) -> Cluster:
    """Rates by preset or file, with the nodes that the launcher's environment describes."""
    if name == "auto":
        name = _preset_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else "laptop"
    rates = Cluster.preset(name) if name in PRESETS else Cluster.load(name)
    here = local_world_size(num_ranks)
    nodes, rest = divmod(num_ranks, here)
    if rest:  # machines of different sizes: full ones, and a last one
        sizes = (here,) * nodes + (rest,)
        return replace(rates, num_nodes=nodes + 1, devices_per_node=sizes)
    return rates.resized(num_nodes=nodes, devices_per_node=here)


def _preset_of(device_name: str) -> str:
    """The preset of a GPU by its name; an A100's where there is none."""
    known = (name for name in ("h100", "h200", "b200") if name in device_name.lower())
    return next(known, "a100")
