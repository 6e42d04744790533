"""One rank of a training job, started by :func:`dcp.launch.ranks.run_ranks` or by torchrun."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dcp.launch.group import choose_device, joined_group
from dcp.launch.heartbeat import Heartbeat
from dcp.train.config import TrainConfig
from dcp.train.trainer import Trainer


def train(job: dict[str, Any]) -> None:
    """:func:`run_rank` with the configuration that :func:`dcp.train.command.launch` hands on."""
    run_rank(TrainConfig.from_mapping(job, where="job"))


def run_rank(config: TrainConfig) -> None:
    """Join the group that the environment describes and train.

    Raises ``RankLost`` within ``config.timeout_seconds`` and some seconds where another rank dies.
    """
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    joined = joined_group(device, timeout_seconds=config.timeout_seconds)
    with joined as group, Heartbeat(group) as heartbeat:
        try:
            with open_trainer(config, group, device) as trainer:
                trainer.train()
        except RuntimeError as error:  # also what torch raises when communication fails
            raise heartbeat.explain(error) from error


def open_trainer(config: TrainConfig, group: dist.ProcessGroup, device: torch.device) -> Any:
    """The training loop that the configuration asks for."""
    if config.is_data_centric:
        from dcp.datacentric.trainer import DataCentricTrainer

        return DataCentricTrainer(config, group, device)
    return Trainer(config, group, device)
