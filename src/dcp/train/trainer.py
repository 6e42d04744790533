"""The planned job: one batch of documents, its attention planned for all ranks, per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcp.cluster import PRESETS, Cluster
from dcp.data.loader import DCPDataLoader, LocalBatch
from dcp.integrations.transformers import NAME, local_logits, register_attention
from dcp.launch.environment import local_world_size
from dcp.planner import plan
from dcp.plans import Plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor
from dcp.train.config import TrainConfig
from dcp.train.loop import TrainingLoop
from dcp.train.model import build_llama, open_dataset, sum_over_ranks, summed_loss

PLAN_PAGE = "plan.html"
_PLAN_FIGURES = (
    "strategy",
    "block_size",
    "planning_seconds",
    "compute_balance",
    "token_balance",
    "num_divisions",
)


class Trainer(TrainingLoop[TrainConfig, tuple[LocalBatch, RankPlan]]):
    """One rank's side of a planned job. Tokens are shared out as each batch's plan says.

    Args:
        config, group, device: as :class:`TrainingLoop`.
        draw_plan: writes the picture of a plan to a file; it is given the first one.
    """

    def __init__(
        self,
        config: TrainConfig,
        group: dist.ProcessGroup,
        device: torch.device | str = "cpu",
        *,
        draw_plan: Callable[[Plan, Path], object] | None = None,
    ) -> None:
        device = torch.device(device)
        dataset, vocab_size = open_dataset(config)
        register_attention()
        model = build_llama(
            config,
            seed=config.seed,
            vocab_size=vocab_size,
            max_positions=config.tokens_per_batch,
            attention=NAME,
            device=device,
        )
        super().__init__(config, group, device, model)
        self._draw_plan = draw_plan
        self.executor = AttentionExecutor(group)
        self.loader = DCPDataLoader(
            dataset,
            config.mask,
            spec=config.spec,
            cluster=make_cluster(config.cluster, self.num_ranks, self.device),
            group=group,
            device=self.device,
            **config.loader_options,
        )

    def close(self) -> None:
        self.loader.close()

    def train(self) -> list[float]:
        self._draw_next_plan()
        return super().train()

    def batches(self) -> Iterator[tuple[LocalBatch, RankPlan]]:
        while True:
            yield from self.loader

    def gradients(self, batch: tuple[LocalBatch, RankPlan]) -> tuple[float, dict[str, Any]]:
        local, rank_plan = batch
        self.executor.prepare(rank_plan)
        autocast = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = local_logits(
                self.model, local.tokens, local.positions, self.executor, dcp_any_mask=True
            )
        loss = local.mean_loss(summed_loss(logits, local.labels))
        self.optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        with torch.no_grad():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            sum_over_ranks([*gradients, total], self.group)
        return float(total), self._figures(local, rank_plan)

    def _figures(self, batch: LocalBatch, rank_plan: RankPlan) -> dict[str, Any]:
        stats, layers = rank_plan.stats, self.config.num_layers
        return {
            "epoch": batch.epoch,
            "batch": batch.index,
            "num_sequences": len(batch.seqlens),
            "num_tokens": batch.num_tokens,
            "num_loss_tokens": batch.num_loss_tokens,
            "plan_wait_seconds": batch.plan_wait_seconds,
            "planned_ahead": batch.planned_ahead,
            **{name: getattr(stats, name) for name in _PLAN_FIGURES},
            # of the forward passes of all layers
            "inter_node_bytes": stats.inter_node_bytes * layers,
            "intra_node_bytes": stats.intra_node_bytes * layers,
        }

    def describe(self, metrics: dict[str, Any]) -> str:
        moved = metrics["inter_node_bytes"] + metrics["intra_node_bytes"]
        depth, waited = metrics["planned_ahead"], metrics["plan_wait_seconds"]
        ahead = "" if depth is None else f", {depth} planned ahead"
        return (
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"balance {metrics['compute_balance']:.2f}, {moved / 1e6:.1f} MB moved"
            f"{ahead}, {waited / metrics['seconds']:.1%} waiting for plans"
        )

    def position(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict()}

    def go_to(self, position: dict[str, Any]) -> None:
        self.loader.load_state_dict(position["loader"])

    def _draw_next_plan(self) -> None:
        """Draw the plan of the batch that comes next (the planner repeats itself)."""
        if self.journal is None or self._draw_plan is None or not self.loader.plans:
            return
        state = self.loader.state_dict()
        with suppress(ValueError):  # which the loader will raise on all ranks, not just here
            batch = self.loader.sequence_batch(state["epoch"], state["position"])
            made = plan(batch, self.config.spec, self.loader.cluster, **self.config.plan_options)
            self._draw_plan(made, self.journal.folder / PLAN_PAGE)


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
