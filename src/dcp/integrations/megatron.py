"""Megatron-Core models with planned attention, through the layer specification.

::

    model = planned_positions(GPTModel(config, planned_spec(layer_spec), …))
    loader, executor = planned_data(dataset, config=config, tokens_per_batch=131072)
    batches = planned_batches(loader, executor, config=config)
    get_forward_backward_func()(planned_forward_step, batches, [model], num_microbatches=4, …)

The ranks of Megatron's data-parallel group share out the tokens of every micro-batch; its own
``context_parallel_size`` stays 1. Ranks of one tensor- or pipeline-parallel group hold the same
tokens. Each micro-batch carries its plan to the layers as ``packed_seq_params``, so recomputation
and the stages of a pipeline attend under the plan of their micro-batch. What attention cannot
honour raises ``ValueError`` where the layer is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import pad

from dcp.batch import AttentionSpec
from dcp.data import DCPDataLoader, LocalBatch
from dcp.integrations.megatron_attention import (
    FULL,
    SLIDING,
    PlannedCoreAttention,
    PlannedSeqParams,
    planned_core_attention,
    planned_positions,
    planned_spec,
)
from dcp.integrations.megatron_checks import check_model
from dcp.runtime import AttentionExecutor
from dcp.runtime.executor import BoundPlan

__all__ = [
    "MicroBatch",
    "PlannedCoreAttention",
    "PlannedSeqParams",
    "attention_spec",
    "mean_loss",
    "planned_batches",
    "planned_core_attention",
    "planned_data",
    "planned_forward_step",
    "planned_positions",
    "planned_spec",
]
_NO_LABEL = -100


# ---------------------------------------------------------------------- the data


def planned_data(
    dataset: Any, mask_fn: Any = None, *, config: Any, **options: Any
) -> tuple[DCPDataLoader, AttentionExecutor]:
    """A loader and an executor over the groups of ``parallel_state``; collective over all ranks.

    Args:
        dataset, options: as for :class:`dcp.DCPDataLoader`; a ``cluster`` has one device per rank
            of the data-parallel group. With ``micro_batches``, as many as a step has, documents
            are dealt to them so that the stages of a pipeline take equally long for each.
        mask_fn: None: what the configuration asks for, causal with the window of each layer that
            has one. Where some have, an own function returns masks by name, ``"full"`` and
            ``"sliding"``.
        config: the model's ``TransformerConfig``.

    Raises ``ValueError`` as the loader does, and for one mask where some layers have windows.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    masks, weights = _masks(config)
    if isinstance(mask_fn, str) and SLIDING in masks:
        raise ValueError(
            f"mask_fn={mask_fn!r} is one mask, and layers differ (window_size="
            f"{config.window_size}): leave it out, or return masks called {' and '.join(masks)}"
        )
    options = {"mask_weights": weights if len(masks) > 1 else None, **options}
    width = {"model_width": config.hidden_size}
    options["plan_options"] = width | dict(options.get("plan_options") or {})
    spec = attention_spec(config)
    loader = DCPDataLoader(
        dataset,
        (lambda seqlens, samples: masks) if mask_fn is None else mask_fn,
        spec=spec,
        group=dist.group.WORLD,
        attention_group=group,
        **options,
    )
    return loader, AttentionExecutor(group, kernel=loader.cluster.kernel_for(spec))


def attention_spec(config: Any) -> AttentionSpec:
    """The heads of one layer on one tensor-parallel rank; KV heads fewer than ranks are held by
    several, one each."""
    ranks = config.tensor_model_parallel_size
    heads = config.num_attention_heads // ranks
    if config.multi_latent_attention:  # every head has keys and values of its own, of two widths
        width = config.qk_head_dim + config.qk_pos_emb_head_dim
        kv_heads, values = heads, config.v_head_dim
    else:
        width = values = config.kv_channels
        kv_heads = max(config.num_query_groups // ranks, 1)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        value_dim=values,
        dtype=config.params_dtype,
    )


def _masks(config: Any) -> tuple[dict[str, str], dict[str, int]]:
    """Masks by name as the layers need them, and the number of layers that use each."""
    numbers = range(1, config.num_layers + 1)
    windowed = sum(
        is_layer_window_attention(config.window_size, config.window_attn_skip_freq, number)
        for number in numbers
    )
    weights = {FULL: len(numbers) - windowed, SLIDING: windowed}
    masks = {FULL: "causal"}
    if windowed:  # Megatron's window counts the keys before a token's own
        masks[SLIDING] = f"sliding_window:window={config.window_size[0] + 1}"
    return {n: masks[n] for n in weights if weights[n]}, {n: w for n, w in weights.items() if w}


@dataclass(frozen=True)
class MicroBatch:
    """A rank's part of a micro-batch, as a model takes it.

    Attributes:
        tokens, labels, positions: int64 ``[1, rows]``: the rank's tokens, then rows that fill up,
            with token 0, label -100 and position 0. There is at least one row.
        padding: bool ``[1, rows]``, true for the rows that fill up.
        params: carries the plan.
        local: the loader's own batch.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    padding: Tensor
    params: PlannedSeqParams
    local: LocalBatch


def planned_batches(
    loader: DCPDataLoader, executor: AttentionExecutor, *, config: Any, rows_multiple: int = 1
) -> Iterator[MicroBatch]:
    """Micro-batches without end, epoch after epoch: the ``data_iterator`` of Megatron's schedules.

    All ranks take the same number. The chunks of an interleaved pipeline need the same ones each:
    give ``list(itertools.tee(batches, num_chunks))``.

    Args:
        config: the model's; under ``sequence_parallel`` rows are filled up to a multiple of the
            tensor-parallel size.
        rows_multiple: fill up to a multiple of this, too, as kernels may need.
    """
    multiple = rows_multiple * (
        config.tensor_model_parallel_size if config.sequence_parallel else 1
    )
    while True:
        for batch, plan in loader:
            yield _micro_batch(batch, executor.bind(plan), multiple)


def _micro_batch(batch: LocalBatch, bound: BoundPlan, multiple: int) -> MicroBatch:
    local = len(batch.tokens)
    fill = batch.rows_to_fill(multiple)
    tokens, positions = (pad(rows, (0, fill)) for rows in (batch.tokens, batch.positions))
    labels = pad(batch.labels, (0, fill), value=_NO_LABEL)
    params = PlannedSeqParams(bound=bound, positions=positions)
    padding = torch.arange(local + fill, device=tokens.device) >= local
    return MicroBatch(tokens[None], labels[None], positions[None], padding[None], params, batch)


# ---------------------------------------------------------------------- the step


def planned_forward_step(
    batches: Iterator[MicroBatch], model: Any
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """``forward_step_func`` of Megatron's schedules: next-token losses of the next micro-batch.

    The loss is a sum over the rank's labels and comes with their number, so that with
    ``calculate_per_token_loss`` gradients are those of the mean over the whole step's labels.
    """
    check_model(model, planned=True)
    batch = next(batches)
    losses = model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.labels.clamp(min=0),
        packed_seq_params=batch.params,
        padding_mask=batch.padding,
    )
    return losses, partial(_summed_loss, batch.labels)


def _summed_loss(labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    counted = labels != _NO_LABEL
    total = losses.float().masked_fill(~counted, 0).sum()
    count = counted.sum()
    report = torch.stack([total.detach(), count.to(total.dtype)])
    return total, count.to(torch.int), {"lm loss": report}


def mean_loss(reports: Sequence[dict[str, Tensor]], *, device: Any = "cpu") -> float:
    """Mean loss of a step over the labels of all ranks, from what the schedule returned; every rank
    calls it and gets the same."""
    total = torch.zeros(2, device=device)
    for report in reports:  # none but on the last stage
        total += report["lm loss"]
    dist.all_reduce(total)  # tensor-parallel ranks count alike, which leaves the mean as it is
    return float(total[0] / total[1].clamp(min=1))
