"""Several nodes on one Linux machine: network namespaces behind links of a chosen speed.

Every node is a namespace with one network card (a veth pair) on a common bridge; ``tc tbf`` shapes
both ways of each card. Ranks of one node talk over its loopback, which is not shaped.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcp.launch.ranks import run_ranks

PREFIX = "dcpbed"
CARD = "eth0"  # the name of a node's network card inside its namespace
# Bytes that pass before shaping sets in: few, so that short messages are slowed down, too.
BURST_BYTES = 16 << 10
HEADER_BYTES = 14 + 20 + 32  # of a frame: Ethernet, IPv4, TCP with timestamps
QUEUE_BYTES = 32 << 20  # so long that nothing is dropped: the link is slow, not lossy
PATIENCE = "10s"  # before TCP sends again: what waits in such a queue is not lost


@dataclass(frozen=True)
class Testbed:
    """Namespaces that are up.

    Attributes:
        namespaces: name of every node, node by node, or of every rank.
        host: this machine's address as the nodes see it.
        one_rank_each: whether a namespace is a rank's.
    """

    namespaces: tuple[str, ...]
    host: str
    one_rank_each: bool = False

    def run(
        self,
        work: str,
        job: dict[str, Any],
        *,
        ranks_per_node: int = 1,
        timeout_seconds: float = 600.0,
    ) -> list[Any]:
        """:func:`dcp.launch.ranks.run_ranks` on ranks that live in the nodes."""

        each = 1 if self.one_rank_each else ranks_per_node

        def enter(rank: int) -> list[str]:
            space = self.namespaces[rank // each]
            return ["ip", "netns", "exec", space, "env", f"GLOO_SOCKET_IFNAME={CARD}"]

        return run_ranks(
            work,
            job,
            num_processes=len(self.namespaces) * each,
            ranks_per_node=ranks_per_node,
            timeout_seconds=timeout_seconds,
            enter=enter,
            host=self.host,
        )


def sent_and_received() -> tuple[int, int]:
    """Bytes of TCP payload that this node's card has sent and received so far.

    The kernel counts frames; what is left without their headers is payload, and an empty
    acknowledgement counts nothing.
    """
    counters = Path("/sys/class/net", CARD, "statistics")
    sent, received = (
        int((counters / f"{way}_bytes").read_text())
        - HEADER_BYTES * int((counters / f"{way}_packets").read_text())
        for way in ("tx", "rx")
    )
    return sent, received


def why_not() -> str | None:
    """None, or why this process cannot make a testbed, and what would help."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root: run as root"
    probe = f"{PREFIX}{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def require_testbed() -> None:
    """``ValueError`` where this process cannot make a testbed, with the reason."""
    if (reason := why_not()) is not None:
        raise ValueError(f"no testbed: {reason}")


@contextmanager
def open_testbed(num_nodes: int, *, bandwidth: float) -> Iterator[Testbed]:
    """Nodes whose cards send and receive ``bandwidth`` bytes per second; removed on leaving.

    An infinite ``bandwidth`` leaves them as fast as they are.

    Raises ``ValueError`` where namespaces cannot be made, with the reason.
    """
    if not 1 <= num_nodes <= 99:
        raise ValueError(f"num_nodes must be 1 to 99, got {num_nodes}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, in bytes per second, got {bandwidth}")
    require_testbed()
    # An interface name holds 15 characters; the process id keeps two testbeds apart.
    tag = f"{PREFIX[:3]}{os.getpid() % 10**7}"
    bridge = f"{tag}br"
    subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    shape = None
    if math.isfinite(bandwidth):
        shape = f"tbf rate {round(bandwidth * 8)}bit burst {BURST_BYTES} limit {QUEUE_BYTES}"
    with ExitStack() as undo:
        _ip(f"link add {bridge} type bridge")
        undo.callback(_ip, f"link del {bridge}")
        host = f"{subnet}.254"
        _ip(f"addr add {host}/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        names = []
        for node in range(num_nodes):
            name, port, address = f"{tag}-{node}", f"{tag}p{node}", f"{subnet}.{node + 1}"
            _ip(f"netns add {name}")
            undo.callback(_ip, f"netns del {name}")  # takes the card with it
            # made here and then moved: a peer made inside its namespace is refused now and then
            _ip(f"link add {port} type veth peer name {port}c")
            undo.callback(_remove, port)
            _ip(f"link set {port}c netns {name} name {CARD}")
            _ip(f"link set {port} master {bridge} up")
            _ip(f"-n {name} link set lo up")
            _ip(f"-n {name} addr add {address}/24 dev {CARD}")
            _ip(f"-n {name} link set {CARD} up")
            _ip(f"-n {name} route change {subnet}.0/24 dev {CARD} src {address} rto_min {PATIENCE}")
            if shape:
                _run(f"tc qdisc add dev {port} root {shape}")  # the way in
                _run(f"tc -n {name} qdisc add dev {CARD} root {shape}")  # the way out
            names.append(name)
        yield Testbed(tuple(names), host)


def _remove(port: str) -> None:
    """Its end in a namespace may have gone with that, and taken it along."""
    subprocess.run(["ip", "link", "del", port], capture_output=True)


def _ip(arguments: str) -> None:
    _run(f"ip {arguments}")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"no testbed: {command!r} failed: {done.stderr.strip()}")
