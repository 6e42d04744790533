"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290) by Hugging Face's Trainer.

::

    pairs = open_preferences("pairs.jsonl", tokenizer)
    plan = PlanningArguments(tokens_per_batch=65536)
    PreferenceTrainer(model, args, train_dataset=pairs, plan=plan, beta=0.1).train()

A pair's prompt is computed once for both answers. Its tokens may lie on several ranks, and so does
its margin, which is summed over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from dcp.checks import positive
from dcp.data import LocalBatch
from dcp.data.preferences import CHOSEN, SharedPromptMasks
from dcp.data.samples import IGNORED, as_names
from dcp.integrations.logprobs import local_logprobs, refuse_windows
from dcp.integrations.trainer import DCPTrainer, PlanningArguments
from dcp.integrations.transformers import attention_of, register_attention
from dcp.runtime.executor import BoundPlan

__all__ = ["PreferenceTrainer", "pair_margins"]


class PreferenceTrainer(DCPTrainer):
    """:class:`DCPTrainer` on preference pairs, with the DPO loss: a mean over the pairs of all
    ranks and micro-batches of a step, of ``-log sigmoid(beta * margin)``.

    Args:
        plan: as DCPTrainer's; the mask is :class:`dcp.data.SharedPromptMasks`, the field
            ``answer`` is read.
        beta: how much a nat of margin over the reference counts.
        reference: a frozen model of the same attention. None: the model with its adapters switched
            off, or, if it has none, a copy of it as it is at the start.

    Datasets hold samples of :class:`dcp.data.PreferencePairs`, or of :func:`dcp.data.answers_to`
    with the chosen answer before the rejected one. Lines of the log have ``reward_margin`` and
    ``reward_accuracy``, means over the pairs since the last one.

    Raises ``ValueError`` for what has no part in it, and for models with windows of attention.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *others: Any,
        plan: PlanningArguments, beta: float = 0.1, reference: torch.nn.Module | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        for name in ("compute_metrics", "compute_loss_func"):
            if options.get(name) is not None:
                raise ValueError(f"{name} has no part in preference pairs: leave it out")
        if plan.mask is not None:
            raise ValueError(f"the mask of preference pairs is their own, got mask={plan.mask!r}")
        self.beta = positive("beta", beta)
        fields = ("answer", *as_names(plan.loader_options.get("fields", ())))
        plan = replace(
            plan,
            mask=SharedPromptMasks(),
            loader_options={**plan.loader_options, "fields": tuple(dict.fromkeys(fields))},
        )
        super().__init__(model, args, *others, plan=plan, **options)
        self.loss_is_scaled_for_ga = True  # by the number of pairs of the whole step
        policy: Any = self.model
        refuse_windows(attention_of(policy))
        if self.label_smoother is not None:
            raise ValueError("label_smoothing_factor has no part in preference pairs: set it to 0")
        if reference is None and not hasattr(policy, "disable_adapter"):
            reference = deepcopy(policy)
        self.reference = None if reference is None else self._frozen(reference)
        self._margins: list[Tensor] = []  # since the last line of the log

    def _frozen(self, reference: Any) -> torch.nn.Module:
        register_attention()
        reference.set_attn_implementation("dcp")
        reference.requires_grad_(False).eval()
        prepared: torch.nn.Module = self.accelerator.prepare_model(reference, evaluation_mode=True)
        return prepared

    def num_items(self, batch: LocalBatch) -> int:
        """Pairs of a batch."""
        return len(batch.pieces)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of this batch's pairs on all ranks; its gradient is that of this rank's tokens,
        times the number of ranks, over which gradients are a mean."""
        batch, bound = inputs["dcp_batch"], inputs["dcp_plan"]
        self._note(model, batch, bound)
        with torch.no_grad(), self._reference_of(model) as reference:
            before = self._logprobs(reference, batch, bound)
        margins = pair_margins(batch, self._logprobs(model, batch, bound) - before, self.group)
        if model.training:
            self._margins.append(margins.detach())
        total = -logsigmoid(self.beta * margins).sum()
        loss = total / (len(margins) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    @contextmanager
    def _reference_of(self, model: Any) -> Iterator[Any]:
        if self.reference is not None:
            yield self.reference
        else:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield model

    def _logprobs(self, model: Any, batch: LocalBatch, bound: BoundPlan) -> Tensor:
        values = local_logprobs(
            model, batch.tokens, batch.positions, batch.labels, bound, dcp_any_mask=True
        )
        return values[:, 0]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **options: Any
    ) -> Any:
        """Trainer's; the loss is all that is predicted."""
        return super().prediction_step(model, inputs, True, *args, **options)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """DCPTrainer's lines, with the margins of the pairs."""
        if "loss" in logs and self._margins:
            margins = torch.cat(self._margins)
            logs["reward_margin"] = float(self.beta * margins.mean())
            logs["reward_accuracy"] = float((margins > 0).float().mean())
            self._margins.clear()
        super().log(logs, *args, **options)


def pair_margins(batch: LocalBatch, logprobs: Tensor, group: Any) -> Tensor:
    """Of every pair of a batch, how much more the chosen answer counts: ``[num_sequences]``.

    Collective. Values are the same on all ranks; gradients go to this rank's tokens, times the
    number of ranks, as gradients that are averaged over them need it.

    Args:
        logprobs: of this rank's labels that count, less those of a reference: ``[rows]``.
        group: over which attention runs; None for a process alone.
    """
    counted = batch.labels != IGNORED
    chosen = batch.fields["answer"][counted] == CHOSEN
    signed = torch.where(chosen, logprobs, -logprobs)
    own = signed.new_zeros(len(batch.pieces)).index_add(0, batch.sequence_ids[counted], signed)
    if group is None:
        return own
    total = own.detach().clone()
    dist.all_reduce(total, group=group)
    return total + dist.get_world_size(group) * (own - own.detach())
