"""The training loop: one batch, planned for all ranks, per optimiser step."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcp.cluster import PRESETS, Cluster
from dcp.data.datasets import TokenDataset
from dcp.data.loader import DCPDataLoader, LocalBatch
from dcp.data.sources import open_documents
from dcp.data.tokenizers import open_tokenizer
from dcp.integrations.transformers import local_logits
from dcp.planner import plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor
from dcp.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from dcp.train.config import TrainConfig
from dcp.train.journal import Journal
from dcp.train.model import (
    build_model,
    build_optimizer,
    learning_rate,
    sum_over_ranks,
    summed_loss,
)

_PLAN_FIGURES = (
    "strategy",
    "block_size",
    "planning_seconds",
    "compute_balance",
    "token_balance",
    "num_divisions",
)


class Trainer:
    """One rank's side of a job. Weights are the same on all ranks; tokens are shared out.

    Args:
        config: the job.
        group: the ranks, one process each.
        device: where this rank computes.
    """

    def __init__(
        self, config: TrainConfig, group: dist.ProcessGroup, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.group, self.device = config, group, torch.device(device)
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        tokenizer = open_tokenizer(config.tokenizer)
        documents = open_documents(
            config.source,
            text_field=config.text_field,
            split=config.split,
            limit=config.max_documents or None,
        )
        self.model = build_model(config, vocab_size=tokenizer.vocab_size, device=self.device)
        for parameter in self.model.parameters():
            dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)
        self.optimizer = build_optimizer(self.model, config)
        self.executor = AttentionExecutor(group)
        self.loader = DCPDataLoader(
            TokenDataset(documents, tokenizer),
            config.mask,
            spec=config.spec,
            cluster=make_cluster(config.cluster, self.num_ranks, self.device),
            group=group,
            device=self.device,
            **config.loader_options,
        )
        self.step, self._clock = 0, time.perf_counter()
        if config.resume:
            self._resume(find_checkpoint(config.resume, Path(config.output)))
        self.journal = Journal(config, first_step=self.step) if self.rank == 0 else None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()
        if self.journal:
            self.journal.close()

    def train(self) -> list[float]:
        """Train to ``config.steps``; returns the loss of each step that was run here."""
        losses: list[float] = []
        self.model.train()
        self._draw_next_plan()
        self._clock = time.perf_counter()
        while self.step < self.config.steps:
            for batch, rank_plan in self.loader:
                losses.append(self._train_step(batch, rank_plan))
                every = self.config.checkpoint_every
                if self.step == self.config.steps or (every and self.step % every == 0):
                    self.save()
                if self.step == self.config.steps:
                    break
        return losses

    def save(self) -> None:
        """Write a checkpoint, from the first rank."""
        if self.rank == 0:
            folder = Path(self.config.output) / "checkpoints" / f"step-{self.step:08d}"
            state = {
                "step": self.step,
                "loader": self.loader.state_dict(),
                "config": self.config.to_json(),
            }
            save_checkpoint(folder, self.model, self.optimizer, state)

    # ------------------------------------------------------------------ one step

    def _train_step(self, batch: LocalBatch, rank_plan: RankPlan) -> float:
        self.executor.prepare(rank_plan)
        loss = self._accumulate_gradients(batch)
        norm = self._clip()
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        if self.journal:
            self.journal.step(self._metrics(batch, rank_plan, loss, norm, rate, seconds))
        return loss

    def _accumulate_gradients(self, batch: LocalBatch) -> float:
        """Gradients of the mean loss over all ranks' labels; returns that loss."""
        autocast = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = local_logits(self.model, batch.tokens, batch.positions, self.executor)
        loss = summed_loss(logits, batch.labels) / max(batch.num_loss_tokens, 1)
        self.optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        with torch.no_grad():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            sum_over_ranks([*gradients, total], self.group)
        return float(total)

    def _clip(self) -> float:
        """Clip the gradient, equal on all ranks by now; returns its norm before."""
        limit = self.config.grad_clip or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))

    def _metrics(
        self,
        batch: LocalBatch,
        rank_plan: RankPlan,
        loss: float,
        norm: float,
        rate: float,
        seconds: float,
    ) -> dict[str, Any]:
        stats, layers = rank_plan.stats, self.config.num_layers
        return {
            "step": self.step - 1,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "epoch": batch.epoch,
            "batch": batch.index,
            "num_sequences": len(batch.seqlens),
            "num_tokens": batch.num_tokens,
            "num_loss_tokens": batch.num_loss_tokens,
            "seconds": seconds,
            "tokens_per_second": batch.num_tokens / seconds,
            "plan_wait_seconds": batch.plan_wait_seconds,
            "planned_ahead": batch.planned_ahead,
            **{name: getattr(stats, name) for name in _PLAN_FIGURES},
            # of the forward passes of all layers
            "inter_node_bytes": stats.inter_node_bytes * layers,
            "intra_node_bytes": stats.intra_node_bytes * layers,
        }

    # ------------------------------------------------------------------ around the loop

    def _resume(self, folder: Path) -> None:
        state = load_checkpoint(folder, self.model, self.optimizer)
        self.loader.load_state_dict(state["loader"])
        self.step = state["step"]
        if self.step >= self.config.steps:
            raise ValueError(
                f"{folder} is already at step {self.step} of steps={self.config.steps}"
            )

    def _draw_next_plan(self) -> None:
        """Draw the plan of the batch that comes next (the planner repeats itself)."""
        if self.journal is None or not self.loader.plans:
            return
        state = self.loader.state_dict()
        with suppress(ValueError):  # which the loader will raise on all ranks, not just here
            batch = self.loader.sequence_batch(state["epoch"], state["position"])
            made = plan(batch, self.config.spec, self.loader.cluster, **self.config.plan_options)
            self.journal.draw(made)


def make_cluster(name: str, num_ranks: int, device: torch.device) -> Cluster:
    """Rates by preset or file, with the nodes that the launcher's environment describes."""
    if name == "auto":
        name = _preset_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else "laptop"
    rates = Cluster.preset(name) if name in PRESETS else Cluster.load(name)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    nodes, rest = divmod(num_ranks, here)
    if rest:  # machines of different sizes: full ones, and a last one
        sizes = (here,) * nodes + (rest,)
        return replace(rates, num_nodes=nodes + 1, devices_per_node=sizes)
    return rates.resized(num_nodes=nodes, devices_per_node=here)


def _preset_of(device_name: str) -> str:
    """The preset of a GPU by its name; an A100's where there is none."""
    known = (name for name in ("h100", "h200", "b200") if name in device_name.lower())
    return next(known, "a100")
