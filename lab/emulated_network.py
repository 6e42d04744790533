"""A whole cluster's links on one Linux machine: one network namespace a rank.

A rank has two cards. ``dev0`` leads to a bridge of its node's ranks and is shaped to a device's
link inside the node; ``eth0`` leads to the node's network bridge and is shaped to a device's card
there. Each node's bridge has one uplink, shaped to the node's network, to a bridge between all
nodes. All are shaped both ways by ``tc tbf``; routes choose the card by destination.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from dcp.cluster import Cluster
from dcp.kernel_table import scaled_table
from lab.testbed import (
    CARD,
    HEADER_BYTES,
    PATIENCE,
    QUEUE_BYTES,
    Testbed,
    require_testbed,
)

DEVICE = "dev0"  # the name of a rank's card inside its node
MOST_RANKS = 250  # addresses of one subnet
RATES = (
    "inter_node_bandwidth", "device_network_bandwidth", "intra_node_bandwidth", "device_flops",
    "memory_bandwidth",
)  # fmt: skip
TIMES = ("inter_node_latency", "intra_node_latency", "launch_seconds")
SEGMENTS = 40  # packets that the kernel hands on at once, for the cores' sake: 60 kB at most,
LEAST_BYTES = 16 << 10  # these at least,
PACKET_SECONDS = 1.5e-3  # and between them what a link takes in this time
LATE_SECONDS = 4e-3  # that a timer may be: what a link may send at once makes up for it
PACKET = 1448  # bytes of payload
WINDOW = 1 << 20  # bytes on their way between two ranks, at most:
WINDOW_SECONDS = 0.05  # what a link takes in this time. More only waits in queues, where flows that
LEAST_WINDOW = 64 << 10  # came first are served first: a network shares links out evenly
WIRE_BYTES = 1514 / (1514 - HEADER_BYTES)  # that a link carries for a byte of payload


@contextmanager
def open_network(cluster: Cluster) -> Iterator[Testbed]:
    """Links of the cluster's bandwidths; removed on leaving. Latencies are none of theirs.

    Raises ``ValueError`` where namespaces cannot be made, with the reason.
    """
    if not 1 <= cluster.num_ranks <= MOST_RANKS:
        raise ValueError(f"{cluster.num_ranks} ranks are not 1 to {MOST_RANKS}: give fewer nodes")
    require_testbed()
    network = _Network(cluster)
    with ExitStack() as undo:
        undo.callback(network.remove)
        network.add()
        yield Testbed(tuple(network.spaces), network.host, one_rank_each=True)


class _Network:
    """Names and addresses of it all; the process id keeps two networks apart."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.tag = f"dc{os.getpid() % 10**7}"
        self.node = cluster.node_of_rank.tolist()
        self.spaces = [f"{self.tag}r{rank}" for rank in range(cluster.num_ranks)]
        self.subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.host = f"{self.subnet}.254"
        self.core = f"{self.tag}b"

    def address(self, rank: int) -> str:
        return f"{self.subnet}.{rank + 1}"

    def add(self) -> None:
        _batch("ip", [f"link add {self.core} type bridge",
                      f"addr add {self.host}/24 dev {self.core}",
                      f"link set {self.core} up"])  # fmt: skip
        for node in range(self.cluster.num_nodes):
            self._add_node(node)
        for rank in range(self.cluster.num_ranks):
            self._add_rank(rank)

    def remove(self) -> None:
        """All of it, and what of it there is: a half-made network goes, too."""
        links = [self.core]
        for node in range(self.cluster.num_nodes):
            links += [f"{self.tag}{kind}{node}" for kind in ("n", "i", "u")]
        for space in self.spaces:  # which take their ends of the cards with them
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for rank in range(self.cluster.num_ranks):
            links += [f"{self.tag}{kind}{rank}" for kind in ("e", "d")]
        for link in links:
            subprocess.run(["ip", "link", "del", link], capture_output=True)

    def _add_node(self, node: int) -> None:
        """Two bridges, and the uplink from one of them."""
        network, inside, uplink = (f"{self.tag}{kind}{node}" for kind in ("n", "i", "u"))
        _batch("ip", [
            f"link add {network} type bridge", f"link set {network} up",
            f"link add {inside} type bridge", f"link set {inside} up",
            f"link add {uplink} type veth peer name {uplink}c",
            f"link set {uplink} master {self.core} up",
            f"link set {uplink}c master {network} up",
        ])  # fmt: skip
        shape = self._shape(self.cluster.inter_node_bandwidth)
        _batch("tc", [f"qdisc add dev {end} root {shape}" for end in (uplink, f"{uplink}c")])

    def _add_rank(self, rank: int) -> None:
        space, node, own = self.spaces[rank], self.node[rank], self.address(rank)
        far, near = (f"{self.tag}{kind}{rank}" for kind in ("e", "d"))
        _batch("ip", [
            f"netns add {space}",
            f"link add {far} type veth peer name {far}c",
            f"link set {far}c netns {space} name {CARD}",
            f"link add {near} type veth peer name {near}c",
            f"link set {near}c netns {space} name {DEVICE}",
            f"link set {far} master {self.tag}n{node} up",
            f"link set {near} master {self.tag}i{node} up",
        ])  # fmt: skip
        others = [p for p in range(self.cluster.num_ranks) if p != rank]
        cards = {p: DEVICE if self.node[p] == node else CARD for p in others}
        windows = {
            CARD: _window(self.cluster.device_network_bandwidth),
            DEVICE: _window(self.cluster.intra_node_bandwidth),
        }
        _batch("ip", [
            f"link set {CARD} address {_hardware(CARD, rank)}",
            f"link set {DEVICE} address {_hardware(DEVICE, rank)}",
            "link set lo up", f"addr add {own}/24 dev {CARD}",
            *(f"link set {each} gso_max_size {_packet(bandwidth)}" for each, bandwidth in (
                (CARD, self.cluster.device_network_bandwidth),
                (DEVICE, self.cluster.intra_node_bandwidth),
            )),
            f"link set {CARD} up", f"link set {DEVICE} up",
            # whole windows from the first message on: cards of GPUs do not start slowly
            *(f"route add {self.address(p)}/32 dev {card} src {own} rto_min {PATIENCE} "
              f"window {windows[card]} initcwnd {windows[card] // PACKET} "
              f"initrwnd {windows[card] // PACKET}"
              for p, card in cards.items()),
            # said, not asked: a kernel keeps about a thousand answers, of all namespaces
            *(f"neigh add {self.address(p)} lladdr {_hardware(card, p)} dev {card} nud permanent"
              for p, card in cards.items()),
        ], space=space)  # fmt: skip
        _run(
            "ip",
            "netns",
            "exec",
            space,
            "sh",
            "-c",
            f"cd /proc/sys/net/ipv4; echo {SEGMENTS} > tcp_min_tso_segs; "
            "echo 0 > tcp_slow_start_after_idle; echo 0 > tcp_early_retrans; "
            f"for name in tcp_rmem tcp_wmem; do echo 4096 {WINDOW} {2 * WINDOW} > $name; done",
        )
        card = self._shape(self.cluster.device_network_bandwidth)
        device = self._shape(self.cluster.intra_node_bandwidth)
        _batch("tc", [f"qdisc add dev {far} root {card}", f"qdisc add dev {near} root {device}"])
        _batch("tc", [f"qdisc add dev {CARD} root {card}", f"qdisc add dev {DEVICE} root {device}"],
               space=space)  # fmt: skip

    def _shape(self, bandwidth: float) -> str:
        """Bytes of payload per second."""
        rate = bandwidth * WIRE_BYTES
        spare = min(max(rate * LATE_SECONDS, LEAST_BYTES / 2), LEAST_BYTES * 2)
        burst = round(_packet(bandwidth) + spare)
        return f"tbf rate {round(rate * 8)}bit burst {burst} limit {QUEUE_BYTES}"


def _packet(bandwidth: float) -> int:
    """Bytes that the kernel hands on at once: few beside what a link may send at once, so that a
    late timer loses no time of the link."""
    return int(min(max(bandwidth * PACKET_SECONDS, LEAST_BYTES), SEGMENTS * PACKET))


def _window(bandwidth: float) -> int:
    """Bytes of one flow that are on their way over a link."""
    return int(min(max(bandwidth * WINDOW_SECONDS, LEAST_WINDOW), WINDOW))


def _hardware(card: str, rank: int) -> str:
    """The hardware address of a rank's card."""
    return f"02:dc:{(CARD, DEVICE).index(card):02x}:00:00:{rank:02x}"


def _batch(tool: str, lines: list[str], *, space: str | None = None) -> None:
    where = ["-n", space] if space else []
    _run(tool, *where, "-batch", "-", told="\n".join(lines))


def _run(tool: str, *words: str, told: str = "") -> None:
    done = subprocess.run([tool, *words], input=told, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"no testbed: {tool} failed: {done.stderr.strip()}")


def dilated(cluster: Cluster, dilation: float) -> Cluster:
    """The cluster in stretched time: all that it does takes ``dilation`` times as long."""
    if not dilation >= 1:
        raise ValueError(f"--dilation must be 1 or more, got {dilation}")
    slower = {name: getattr(cluster, name) / dilation for name in RATES}
    longer = {name: getattr(cluster, name) * dilation for name in TIMES}
    for name in ("pack_bandwidth", "linear_flops"):
        if (rate := getattr(cluster, name)) is not None:
            slower[name] = rate / dilation
    kernel_rates = tuple((side, rate / dilation) for side, rate in cluster.kernel_rates)
    table = scaled_table(cluster.kernel_table, forward=dilation, backward=dilation)
    return replace(cluster, kernel_rates=kernel_rates, kernel_table=table, **slower, **longer)
