"""The figures of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class Stats:
    """Figures of a plan; volumes in bytes, of one forward pass of attention.

    ``compute_balance`` and ``token_balance`` are max over ranks ÷ mean over ranks. With several
    masks, compute and volume are sums over the masks weighted by the layers that use each.
    ``max_rank_buffer_bytes``: the fullest rank's buffers in a forward pass.

    ``layer_seconds``: forward and backward seconds of a transformer layer, by which plans are
    chosen; ``limit_seconds``: what no plan can beat, all work at full rate and spread evenly;
    ``layer_excess``: the rest by cause (``imbalance``, ``kernels``, ``intra_node``, ``inter_node``;
    see :class:`dcp.layer.LayerTimes`).
    """

    strategy: str = ""
    block_size: int = 0
    num_tokens: int = 0
    num_compute_blocks: int = 0
    planning_seconds: float = 0.0
    compute_balance: float = 1.0
    token_balance: float = 1.0
    inter_node_bytes: int = 0
    intra_node_bytes: int = 0
    max_rank_recv_bytes: int = 0
    max_rank_send_bytes: int = 0
    max_rank_buffer_bytes: int = 0
    num_divisions: int = 1
    layer_seconds: float = 0.0
    limit_seconds: float = 0.0
    layer_excess: dict[str, float] = field(default_factory=dict)
    simulated: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that ``dcp plan --json`` prints."""
        return asdict(self)


def balance(load: np.ndarray) -> float:
    """Maximum over mean; 1.0 is perfect, and so is no load at all."""
    mean = load.mean()
    return float(load.max() / mean) if mean > 0 else 1.0
