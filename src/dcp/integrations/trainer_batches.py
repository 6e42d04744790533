"""What DCPTrainer gives its model and takes back: batches of one row, and evaluation by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp.cluster import Cluster
from dcp.data import DCPDataLoader, LocalBatch, gather_samples
from dcp.data.samples import IGNORED
from dcp.integrations.describe import Attention
from dcp.program import RankPlan
from dcp.ragged import starts
from dcp.runtime import AttentionExecutor


@dataclass(frozen=True, kw_only=True)
class PlanningArguments:
    """How batches are filled and attention is planned; what is not here is ``TrainingArguments``'.

    Args:
        tokens_per_batch: of a micro-batch, over all ranks.
        eval_tokens_per_batch: the same in evaluation; None is ``tokens_per_batch``.
        mask: name of a mask, or ``mask_fn(seqlens, samples)``, for every layer; None is what the
            model asks for (:func:`dcp.integrations.transformers.attention_of`).
        strategy, block_size, look_ahead, cluster: see :func:`dcp.plan` and
            :class:`dcp.DCPDataLoader`.
        num_workers: planning processes of a planning rank.
        calibrate: let ``"auto"`` learn the cluster's rates from what the ranks measure, see
            :meth:`dcp.DCPDataLoader.learn_from`. Plans then differ from run to run, and with them
            the order of sums: a job that goes on from a checkpoint is not equal in every bit. It is
            with False, which keeps the rates of ``cluster``; so does ``full_determinism`` of
            Trainer's arguments.
        loader_options: further keywords of :class:`dcp.DCPDataLoader`, such as ``fields`` or
            ``max_seqlen``.
        plan_options: further keywords of :func:`dcp.plan`.
    """

    tokens_per_batch: int
    eval_tokens_per_batch: int | None = None
    mask: Any = None
    strategy: str = "auto"
    block_size: int | str = "auto"
    look_ahead: int = 4
    num_workers: int = 1
    cluster: Cluster | None = None
    calibrate: bool = True
    loader_options: dict[str, Any] = field(default_factory=dict)
    plan_options: dict[str, Any] = field(default_factory=dict)


class PlannedBatches:
    """A loader as Trainer wants it: one epoch of model inputs per iteration."""

    def __init__(self, loader: DCPDataLoader, executor: AttentionExecutor, dataset: Any) -> None:
        self.loader, self.executor, self.dataset = loader, executor, dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, plan in self.loader:
            yield model_inputs(batch, plan, self.executor)

    def __len__(self) -> int:
        return len(self.loader)


def model_inputs(batch: LocalBatch, plan: RankPlan, executor: AttentionExecutor) -> dict[str, Any]:
    """A batch as keywords of a Hugging Face model, and as ``dcp_batch`` and ``dcp_plan``.

    Rows are ``[1, local + 1]``: the rank's tokens and a stand-in. ``labels`` lie one row behind the
    token that predicts them, where models, ``compute_loss_func`` and label smoothing look for them.
    """
    row = batch.tokens.new_zeros(1)
    return {
        "input_ids": torch.cat([batch.tokens, row])[None],
        "position_ids": torch.cat([batch.positions, row])[None],
        "labels": torch.cat([row + IGNORED, batch.labels])[None],
        "dcp_batch": batch,
        "dcp_plan": executor.bind(plan),
    }


def figures_of(
    seen: Sequence[tuple[LocalBatch, RankPlan]], seconds: float, *, repeated: float
) -> dict[str, float]:
    """Of the batches since the last line of a log: tokens of all, the rest as means.

    Bytes are those of the forward passes of all layers, between all ranks.

    Args:
        repeated: how often a plan's bytes are moved in a pass: 1 where they are of all layers
            already, as of plans with a weight for each of the model's masks.
    """
    batches, plans = zip(*seen, strict=True)
    stats = [plan.stats for plan in plans]
    num_tokens = sum(batch.num_tokens for batch in batches)
    ahead = [batch.planned_ahead for batch in batches if batch.planned_ahead is not None]
    of_plans = ("inter_node_bytes", "intra_node_bytes", "compute_balance", "token_balance",
                "num_divisions", "block_size", "planning_seconds")  # fmt: skip
    means = {name: float(np.mean([getattr(each, name) for each in stats])) for name in of_plans}
    for name in ("inter_node_bytes", "intra_node_bytes"):
        means[name] *= repeated
    return {
        "seconds": seconds,
        "num_tokens": float(num_tokens),
        "tokens_per_second": num_tokens / seconds,
        "num_sequences": float(sum(len(batch.seqlens) for batch in batches)),
        **means,
        "attention_bytes": means["inter_node_bytes"] + means["intra_node_bytes"],
        "plan_wait_seconds": float(np.mean([batch.plan_wait_seconds for batch in batches])),
        **({"planned_ahead": float(np.mean(ahead))} if ahead else {}),
    }


def rank_figures(device: torch.device, **figures: float | None) -> dict[str, list[float]]:
    """Figures of this rank beside those of all others, by name; NaN for what one does not know.

    All ranks call it together. ``memory_bytes`` comes with them: the peak so far of what torch has
    allocated on the rank's GPU; elsewhere of the process's memory.
    """
    if device.type == "cuda":
        memory = float(torch.cuda.max_memory_allocated(device))
    else:
        memory = getrusage(RUSAGE_SELF).ru_maxrss * 1024.0
    every: dict[str, float | None] = {"memory_bytes": memory, **figures}
    mine = torch.tensor([nan if value is None else value for value in every.values()])
    mine = mine.to(device)  # float32 is exact enough to be drawn
    found = [mine]
    if dist.is_initialized():
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
    return dict(zip(every, torch.stack(found).T.tolist(), strict=True))


def over_ranks(figures: dict[str, list[float]]) -> dict[str, float]:
    """Of :func:`rank_figures`, what a line of the log says."""
    found = {}
    if memory := figures.get("memory_bytes"):
        found["max_rank_memory_bytes"] = max(memory)
    shares = [share for share in figures.get("attention_wait_share", ()) if not isnan(share)]
    if shares:
        found["attention_wait_share"] = sum(shares) / len(shares)
        found["max_rank_attention_wait_share"] = max(shares)
    return found


def masks_of(attention: Attention) -> Any:
    """The ``mask_fn`` of what a model asks for: the same masks for every sequence."""

    def mask_fn(seqlens: Any, samples: Any) -> dict[str, list[str]]:
        return {name: [mask] * len(seqlens) for name, mask in attention.masks.items()}

    return mask_fn


class Evaluated:
    """What evaluation has seen so far: losses, items they are of, documents' pieces in turn."""

    def __init__(self) -> None:
        self.loss, self.num_items = torch.zeros((), dtype=torch.float64), 0
        self.pieces: list[np.ndarray] = []

    def add(self, batch: LocalBatch, loss: torch.Tensor, num_items: int) -> None:
        """``loss``: this rank's part of the batch's mean, over ``num_items``."""
        self.loss += loss.double().cpu() * max(num_items, 1)
        self.num_items += num_items
        self.pieces.append(batch.pieces)

    def mean_loss(self, group: Any, device: torch.device) -> float:
        total = self.loss.float().to(device)
        if group is not None:
            dist.all_reduce(total, group=group)
        return float(total) / max(self.num_items, 1)

    def order(self) -> np.ndarray:
        """Sequences by document and place in it."""
        pieces = np.concatenate(self.pieces)
        return np.lexsort((pieces[:, 1], pieces[:, 0]))


def by_sequence(batch: LocalBatch, rows: torch.Tensor, group: Any) -> torch.Tensor:
    """A batch's rows of all ranks as ``[num_sequences, longest, …]``, padded with -100."""
    samples = gather_samples(batch, rows, group=group)
    whole = torch.cat([samples[sample] for sample in sorted(samples)])
    order = np.lexsort((batch.pieces[:, 1], batch.pieces[:, 0]))
    sizes = batch.seqlens
    begins = np.empty_like(sizes)
    begins[order] = starts(sizes[order])
    padded = whole.new_full((len(sizes), int(sizes.max()), *whole.shape[1:]), IGNORED)
    for sequence, (begin, size) in enumerate(zip(begins.tolist(), sizes.tolist(), strict=True)):
        padded[sequence, :size] = whole[begin : begin + size]
    return padded
