"""The machine: nodes, devices, links and their rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.checks import (
    not_too_many,
    number,
    one_of,
    positive,
    read_json,
    shown,
    whole,
    whole_numbers,
)
from dcp.kernel_table import Curves, KernelTable, checked_table, fastest_kernel, table_curves

MOST_RANKS = 2**16  # of a cluster that can be described: arrays by rank stay small
_POSITIVE = (
    "inter_node_bandwidth", "device_network_bandwidth", "intra_node_bandwidth", "device_flops",
    "memory_bandwidth", "backward_ratio",
)  # fmt: skip
_NOT_NEGATIVE = ("inter_node_latency", "intra_node_latency", "launch_seconds")


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
        linear_flops: matrix FLOP per second that a layer's linear parts reach; None:
            ``device_flops``.
        kernel: the attention kernel that the rates are of, which its ranks run: a name of
            :data:`dcp.runtime.kernels.KERNELS`, or "auto": see :meth:`kernel_for`.
        kernel_table: what each kernel was measured to reach, by block size, mask, dtype and
            head_dim (:class:`dcp.kernel_table.KernelRates`). A spec that it has is costed by its
            lines, any other one by the rates above.
        rank_speeds: of each rank's device, 1.0 being as fast as the rates above; empty: all are.
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
    linear_flops: float | None = None
    rank_speeds: tuple[float, ...] = ()
    kernel: str = "auto"
    kernel_table: KernelTable = field(default=(), metadata={"optional": True})
    name: str = "a100-p4de"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {name: positive(name, getattr(self, name)) for name in _POSITIVE}
        checked |= {name: number(name, getattr(self, name)) for name in _NOT_NEGATIVE}
        checked["num_nodes"] = whole("num_nodes", self.num_nodes, least=1, most=MOST_RANKS)
        checked["devices_per_node"] = _devices(self.devices_per_node, checked["num_nodes"])
        checked["kernel_tile"] = whole("kernel_tile", self.kernel_tile, least=1, most=MOST_RANKS)
        checked["kernel_rates"] = _rates(self.kernel_rates)
        checked["kernel_table"] = checked_table(self.kernel_table)
        for name in ("pack_bandwidth", "linear_flops"):
            if (given := getattr(self, name)) is not None:
                checked[name] = positive(name, given)
        each = np.broadcast_to(checked["devices_per_node"], checked["num_nodes"])
        checked["rank_speeds"] = _speeds(self.rank_speeds, int(each.sum()))
        for word in ("name", "kernel"):
            if not isinstance(given := getattr(self, word), str):
                raise ValueError(f"{word} must be a string, got {shown(given)}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

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
    def speed_of_rank(self) -> np.ndarray:
        """Speed of each rank's device, 1.0 being the rates': float64 ``[num_ranks]``."""
        return np.array(self.rank_speeds or [1.0] * self.num_ranks)

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
        rates = dict(PRESETS[one_of("cluster preset", name, PRESETS)])
        if devices_per_node is not None:
            rates["devices_per_node"] = devices_per_node
        return cls(num_nodes=num_nodes, **rates)

    def resized(self, *, num_nodes: int, devices_per_node: int | tuple[int, ...]) -> Cluster:
        """The same links and devices, another number of them."""
        return replace(self, num_nodes=num_nodes, devices_per_node=devices_per_node, rank_speeds=())

    def kernel_for(self, spec: AttentionSpec) -> str:
        """The kernel that ranks run for ``spec``: the one named; with "auto" the table's fastest,
        and where the table has none for its dtype and head_dim, what "auto" means to an executor.
        """
        if self.kernel != "auto" or spec.value_dim != spec.head_dim:
            return self.kernel
        return self._fastest.get((spec.dtype, spec.head_dim), "auto")

    def curves(self, spec: AttentionSpec) -> Curves | None:
        """The table's seconds of blocks by that kernel; None where it has none."""
        if not self.kernel_table or spec.value_dim != spec.head_dim:
            return None
        return self._curves.get((self.kernel_for(spec), spec.dtype, spec.head_dim))

    @cached_property
    def _curves(self) -> dict[tuple[str, str, int], Curves]:
        return table_curves(self.kernel_table)

    @cached_property
    def _fastest(self) -> dict[tuple[str, int], str]:
        """By dtype and head_dim."""
        keys = {(line.dtype, line.head_dim) for line in self.kernel_table}
        found = {key: fastest_kernel(self.kernel_table, *key) for key in keys}
        return {key: kernel for key, kernel in found.items() if kernel is not None}

    def to_json(self) -> dict[str, Any]:
        """All fields, but for a table of no lines, which older readers do not know."""
        fields = asdict(self)
        if not self.kernel_table:
            del fields["kernel_table"]
        return fields

    def save(self, path: str | Path) -> None:
        """Write the cluster as JSON, readable by :meth:`load`."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file (``dcp profile`` writes one); unknown or wrong fields raise."""
        fields = read_json(path)
        try:
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a cluster file: {error}") from None


def _devices(given: Any, num_nodes: int) -> int | tuple[int, ...]:
    """Devices of every node, or of each, none of them without any, and not too many in all."""
    if isinstance(given, (list, tuple, np.ndarray)):
        counts = whole_numbers("devices_per_node", given, least=1, most=MOST_RANKS)
        if len(counts) != num_nodes:
            raise ValueError(f"devices_per_node names {len(counts)} of {num_nodes} nodes")
        devices: int | tuple[int, ...] = tuple(counts.tolist())
        ranks = int(counts.sum())
    else:
        devices = whole("devices_per_node", given, least=1, most=MOST_RANKS)
        ranks = num_nodes * devices
    not_too_many("ranks", ranks, MOST_RANKS, "give fewer nodes or devices_per_node")
    return devices


def _speeds(given: Any, num_ranks: int) -> tuple[float, ...]:
    """A speed per rank, or none at all."""
    if not isinstance(given, (list, tuple, np.ndarray)) or len(given) not in (0, num_ranks):
        raise ValueError(
            f"rank_speeds must be a speed for each of the {num_ranks} ranks, or empty, "
            f"got {shown(given)}"
        )
    return tuple(positive("rank_speeds", speed) for speed in given)


def _rates(given: Any) -> tuple[tuple[int, float], ...]:
    """Measured sides and rates, the sides ascending."""
    try:
        pairs = [(side, rate) for side, rate in given]
    except (TypeError, ValueError):
        raise ValueError(f"kernel_rates must be (side, rate) pairs, got {shown(given)}") from None
    sides = whole_numbers("kernel_rates side", [side for side, _ in pairs], least=1)
    if (np.diff(sides) <= 0).any():
        raise ValueError(f"kernel_rates must have ascending sides, got {sides.tolist()}")
    rates = [positive("kernel_rates rate", rate) for _, rate in pairs]
    return tuple(zip(sides.tolist(), rates, strict=True))


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
