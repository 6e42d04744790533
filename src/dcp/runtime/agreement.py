"""What all ranks must have in common, compared where they meet; a difference is named on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp.runtime.waiting import PatientStore, within

TEXT_SECONDS = 10.0  # how long a rank waits to hear what another has instead
_UNKNOWN = -1


class Gathering:
    """Every rank's numbers on their way to every rank. Constructing it is collective."""

    def __init__(self, group: dist.ProcessGroup, numbers: Sequence[int] | np.ndarray) -> None:
        on_gpu = "nccl" in dist.get_backend(group)
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        self._found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        self._work = dist.all_gather(self._found, own, group=group, async_op=True)
        self._copied: torch.cuda.Event | None = None
        if on_gpu:  # the host goes on, and looks later
            self._work.wait()
            there = torch.stack(self._found)
            here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._found = list(here.copy_(there, non_blocking=True))
            self._copied = torch.cuda.current_stream().record_event()

    @property
    def is_done(self) -> bool:
        """Whether the GPU has come to it; without one, the host waits for it."""
        return self._copied is None or self._copied.query()

    def numbers(self, *, timeout_seconds: float | None = None) -> list[list[int]]:
        """Wait for them; in the order of ranks. :class:`NoAnswer` after ``timeout_seconds``, by
        default the group's own error after the group's own time-out."""
        return [each.tolist() for each in self.arrays(timeout_seconds=timeout_seconds)]

    def arrays(self, *, timeout_seconds: float | None = None) -> list[np.ndarray]:
        """The same as arrays, for many numbers."""
        wait = self._work.wait if self._copied is None else self._copied.synchronize
        if timeout_seconds is None:
            wait()
        else:
            within(timeout_seconds, wait)
        return [each.numpy() for each in self._found]


class Comparison:
    """Facts that must be equal on all ranks of a group, on their way there.

    Constructing it is collective, with the same names everywhere: a number per fact travels. The
    facts themselves follow, through the group's store, only where they differ.

    Args:
        facts: anything whose ``repr`` says what it is; None is not known to this rank.
        advice: ends the error's line.
    """

    def __init__(self, group: dist.ProcessGroup, facts: Mapping[str, Any], *, advice: str) -> None:
        self._group, self._facts, self._advice = group, facts, advice
        self._gathering = Gathering(group, [digest(fact) for fact in facts.values()])

    @property
    def is_done(self) -> bool:
        """See :class:`Gathering`."""
        return self._gathering.is_done

    def finish(self, *, timeout_seconds: float | None = None) -> None:
        """``ValueError`` on every rank: the first fact that differs, two ranks that have it so, and
        what each of them has."""
        rows = self._gathering.numbers(timeout_seconds=timeout_seconds)
        for name, column in zip(self._facts, zip(*rows, strict=True), strict=True):
            known = [rank for rank, number in enumerate(column) if number != _UNKNOWN]
            other = next((rank for rank in known if column[rank] != column[known[0]]), None)
            if other is not None:
                raise ValueError(self._difference(name, known[0], other, digest(rows)))

    def _difference(self, name: str, first: int, other: int, key: int) -> str:
        text, own = repr(self._facts[name]), dist.get_rank(self._group)
        found = ["something else"] * 2
        try:
            store = PatientStore(
                f"dcp-differ/{key}",
                self._group.get_group_store(),
                timeout_seconds=TEXT_SECONDS,
            )
            store.set(f"{name}/{own}", text[:500])
            for i, rank in enumerate((first, other)):
                if store.wait_for([f"{name}/{rank}"], TEXT_SECONDS):
                    found[i] = store.get(f"{name}/{rank}").decode()
            store.set(f"heard/{own}", "")
            if own == 0:  # the store may end with this rank
                ranks = range(dist.get_world_size(self._group))
                store.wait_for([f"heard/{rank}" for rank in ranks], TEXT_SECONDS)
        except RuntimeError:  # the store is gone, with whatever else
            pass
        return (
            f"rank {other} has {name}={found[1]}, rank {first} has {name}={found[0]}: "
            f"{self._advice}"
        )


def digest(value: Any) -> int:
    """63 bits of a value's ``repr``, mappings in the order of their keys."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, Mapping):
        value = sorted(value.items())
    found = blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(found, "little") >> 1
