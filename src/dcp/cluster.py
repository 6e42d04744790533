"""The machine: nodes, devices, links and their rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of devices and the links between them. Ranks are numbered node by node.

    Attributes:
        num_nodes: machines.
        devices_per_node: devices of every node, or one number per node where they differ.
        inter_node_bandwidth: bytes per second of one node's network, each way, shared by its
            devices.
        device_network_bandwidth: bytes per second that one device alone can drive over its node's
            network, each way (a device talks through the network card next to it).
        intra_node_bandwidth: bytes per second of one device's link inside the node, each way.
        inter_node_latency, intra_node_latency: seconds before a transfer's first byte.
        device_flops: matrix FLOP per second that attention reaches on large blocks.
        memory_bandwidth: bytes per second of device memory.
        launch_seconds: fixed cost of one division's launch.
        kernel_rates: measured (side of a square block in tokens, FLOP per second), ascending;
            empty: ``device_flops`` at every size.
        kernel_tile: side, in tokens, of the tiles that a kernel computes whole at a mask's edge.
        backward_ratio: time of the backward kernel over the forward's; 2.5 counts products, five
            against two.
        pack_bandwidth: bytes per second at which a rank packs messages, and at which it unpacks
            them; None: that costs nothing.
        name: what the rates describe.

    The defaults are an A100 p4de node: 8 A100-80GB, NVSwitch (300 GB/s each way), 4 network cards
    of 100 Gb/s.
    """

    num_nodes: int = 1
    devices_per_node: int | tuple[int, ...] = 8
    inter_node_bandwidth: float = 50e9
    device_network_bandwidth: float = 12.5e9
    intra_node_bandwidth: float = 300e9
    inter_node_latency: float = 15e-6
    intra_node_latency: float = 5e-6
    device_flops: float = 280e12
    memory_bandwidth: float = 1.5e12
    launch_seconds: float = 10e-6
    kernel_rates: tuple[tuple[int, float], ...] = ()
    kernel_tile: int = 128
    backward_ratio: float = 2.5
    pack_bandwidth: float | None = None
    name: str = "a100-p4de"

    def __post_init__(self) -> None:
        if isinstance(self.devices_per_node, list):
            object.__setattr__(self, "devices_per_node", tuple(self.devices_per_node))
        rates = tuple((int(side), float(rate)) for side, rate in self.kernel_rates)
        object.__setattr__(self, "kernel_rates", rates)
        if self.num_nodes < 1:
            raise ValueError(f"num_nodes must be 1 or more, got {self.num_nodes}")
        counts = self.node_sizes
        if len(counts) != self.num_nodes:
            raise ValueError(f"devices_per_node names {len(counts)} of {self.num_nodes} nodes")
        if counts.min() < 1:
            raise ValueError(f"devices_per_node must be 1 or more, got {int(counts.min())}")
        positive = ("inter_node_bandwidth", "device_network_bandwidth", "intra_node_bandwidth")
        for field in (*positive, "device_flops", "memory_bandwidth"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")

    @property
    def node_sizes(self) -> np.ndarray:
        """Devices of each node: int64 ``[num_nodes]``."""
        if isinstance(self.devices_per_node, int):
            return np.full(self.num_nodes, self.devices_per_node, dtype=np.int64)
        return np.asarray(self.devices_per_node, dtype=np.int64)

    @property
    def num_ranks(self) -> int:
        return int(self.node_sizes.sum())

    @property
    def node_of_rank(self) -> np.ndarray:
        """Node of each rank: int64 ``[num_ranks]``."""
        return np.repeat(np.arange(self.num_nodes), self.node_sizes)

    @property
    def ring_bandwidth(self) -> float:
        """Bytes per second, each way, of the slowest link in a ring of all ranks."""
        if self.num_nodes == 1:
            return self.intra_node_bandwidth
        network = min(self.device_network_bandwidth, self.inter_node_bandwidth)
        return min(network, self.intra_node_bandwidth) if self.node_sizes.max() > 1 else network

    @classmethod
    def preset(
        cls, name: str, *, num_nodes: int = 1, devices_per_node: int | Sequence[int] | None = None
    ) -> Cluster:
        """Known rates: ``a100`` (p4de), ``a100-p4d``, ``h100``, ``h200``, ``b200``, ``laptop``."""
        if name not in PRESETS:
            raise ValueError(f"cluster preset {name!r} is not one of {', '.join(PRESETS)}")
        rates = dict(PRESETS[name])
        if devices_per_node is not None:
            rates["devices_per_node"] = devices_per_node
        return cls(num_nodes=num_nodes, **rates)

    def resized(self, *, num_nodes: int, devices_per_node: int | tuple[int, ...]) -> Cluster:
        """The same links and devices, another number of them."""
        return replace(self, num_nodes=num_nodes, devices_per_node=devices_per_node)

    def save(self, path: str | Path) -> None:
        """Write the cluster as JSON, readable by :meth:`load`."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file (``dcp profile`` writes one); unknown or wrong fields raise."""
        try:
            fields = json.loads(Path(path).read_text())
            return cls(**fields)
        except (OSError, json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a cluster file: {error}") from None


PRESETS: dict[str, dict[str, Any]] = {
    "a100": {"name": "a100-p4de"},
    "a100-p4d": {"name": "a100-p4d", "memory_bandwidth": 1.2e12},
    "h100": {
        "name": "h100",
        "inter_node_bandwidth": 400e9,
        "device_network_bandwidth": 50e9,
        "intra_node_bandwidth": 450e9,
        "inter_node_latency": 10e-6,
        "device_flops": 600e12,
        "memory_bandwidth": 3.35e12,
    },
    "h200": {
        "name": "h200",
        "inter_node_bandwidth": 400e9,
        "device_network_bandwidth": 50e9,
        "intra_node_bandwidth": 450e9,
        "inter_node_latency": 10e-6,
        "device_flops": 620e12,
        "memory_bandwidth": 4.8e12,
    },
    "b200": {
        "name": "b200",
        "inter_node_bandwidth": 400e9,
        "device_network_bandwidth": 50e9,
        "intra_node_bandwidth": 900e9,
        "inter_node_latency": 10e-6,
        "device_flops": 1300e12,
        "memory_bandwidth": 8e12,
    },
    "laptop": {
        "name": "laptop",
        "devices_per_node": 4,
        "inter_node_bandwidth": 0.125e9,
        "intra_node_bandwidth": 2e9,
        "inter_node_latency": 100e-6,
        "intra_node_latency": 50e-6,
        "device_flops": 0.1e12,
        "memory_bandwidth": 2e10,
        "launch_seconds": 50e-6,
    },
}
