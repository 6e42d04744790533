"""Running an iteration: every group its micro-batches, and gradients that are those of one process.

A rank's loss is its part of the sum over all samples (or labelled tokens) of the iteration, divided
by their number over all ranks, which every rank knows from the plan. Gradients are then added up
over all ranks. So a sample weighs the same in whatever group, batch or accumulation it was.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dcp.datacentric.iteration import Iteration
from dcp.datacentric.measure import now
from dcp.datacentric.sequence_group import SequenceGroup
from dcp.datacentric.sums import sum_over_ranks
from dcp.datacentric.workload import Workload, keep_activations_of
from dcp.runtime.communicator import GroupCommunicator


class IterationRunner:
    """Runs iterations of a workload on this rank.

    Args:
        group: all ranks. Groups of an iteration exchange messages over it, too.
        autocast: bfloat16 in the forward pass.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        autocast: bool = False,
    ) -> None:
        self.workload, self.model, self.group = workload, model, group
        self.device, self.autocast = device, autocast
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._layers = workload.layers(model)
        self._communicator = GroupCommunicator(group)

    def gradients(self, iteration: Iteration, epoch: int) -> tuple[float, list[float]]:
        """Leave the gradient of the mean loss on every rank.

        Returns that loss, and every rank's seconds of work before gradients were added up.
        """
        self.model.zero_grad()
        weight = max(self.workload.weight(iteration.samples), 1)
        started = perf_counter()
        loss = self._accumulate(iteration, epoch, weight)
        busy = torch.zeros(self.num_ranks, dtype=torch.float64, device=self.device)
        busy[self.rank] = now(self.device) - started
        for parameter in self.model.parameters():
            if parameter.grad is None:  # of a rank whose group had no samples
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            gradients: list[Any] = [parameter.grad for parameter in self.model.parameters()]
            sum_over_ranks([*gradients, busy, loss], self.group)
        return float(loss), busy.tolist()

    def _accumulate(self, iteration: Iteration, epoch: int, weight: int) -> torch.Tensor:
        """This rank's part of the loss; its part of the gradient is left with the weights."""
        first, mine = iteration.group_of(self.rank)
        group = SequenceGroup(first, mine.degree, self.rank, self._communicator)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in mine.micro_batches:
            keep_activations_of(self._layers, dict(micro.keep))
            batch = self.workload.load(micro.samples, epoch)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = self.workload.summed_loss(self.model, batch, group) / weight
            loss.backward()
            self.workload.release()
            total += loss.detach()
        return total
