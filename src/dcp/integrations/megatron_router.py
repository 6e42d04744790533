"""Routers of Megatron-Core's experts, whose auxiliary losses go by all tokens of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PlannedRouter(TopKRouter):
    """Takes the place of ``TopKRouter``: the same choice of experts, and its auxiliary losses as
    one rank with the whole micro-batch has them.

    Megatron counts the tokens of each expert over tensor- and context-parallel ranks, and weighs a
    rank's loss by its own tokens. Here the data-parallel ranks share a micro-batch, too, have
    different numbers of tokens, and may have rows that hold none.
    """

    tp_cp_group: dist.ProcessGroup
    tp_dp_cp_group: dist.ProcessGroup

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_group, self.tp_cp_group = self.tp_cp_group, self.tp_dp_cp_group

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Any:
        """``padding_mask``: true for rows that hold no token, ``[rows, 1]`` of this rank, or of all
        tensor-parallel ranks."""
        if padding_mask is not None and len(padding_mask) > len(input):
            # under sequence parallelism, Megatron divides it on the first stage of a pipeline only
            padding_mask = padding_mask.chunk(self.own_group.size())[self.own_group.rank()]
        if self.is_aux_loss_enabled():
            if padding_mask is None:
                padding_mask = torch.zeros(len(input), 1, dtype=torch.bool, device=input.device)
            self._num_tokens = (~padding_mask).sum(dtype=torch.float32)
            dist.all_reduce(self._num_tokens, group=self.tp_dp_cp_group)
        return super().forward(input, padding_mask)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, coeff: float, loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A rank's part of the loss, weighed by the tokens of all ranks.

        Megatron logs it, and how it would weigh it itself differs by version.
        """
        logged = super().attach_and_log_load_balancing_loss(
            activation, coeff, loss.detach(), *args, **kwargs
        )
        return MoEAuxLossAutoScaler.apply(logged, loss * self._num_tokens)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The sum over the rank's tokens, with no regard to how many ranks there are."""
        weight = self.config.moe_z_loss_coeff
        if weight is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares = logits.logsumexp(dim=-1).square()
        if padding_mask is not None:
            squares = squares.masked_fill(padding_mask, 0)
        mean = squares.sum().detach() / max(len(squares), 1)
        save_to_aux_losses_tracker("z_loss", mean, self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(logits, weight * squares.sum())

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert, by which its bias goes; a repeated pass counts once."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                if padding_mask is not None:
                    routing_map = routing_map & ~padding_mask[:, None]
                self.local_tokens_per_expert += routing_map.sum(dim=0)
