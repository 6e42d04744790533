"""How a planned batch reaches the ranks: each rank's share, through the job's own store."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from dcp import wire
from dcp.data.messages import PlanningError, PoolLost
from dcp.data.samples import KINDS, Kinds
from dcp.data.segments import ONE
from dcp.program import RankPlan
from dcp.received import check_columns, require
from dcp.runtime.agreement import Comparison, Gathering
from dcp.runtime.group import resolve_group
from dcp.runtime.waiting import NoAnswer, PatientStore

Met = TypeVar("Met")

_KIND = "batch-share"
_WITHDRAWN = b"withdrawn"
_COUNTS = ("num_loss_tokens", "last", "num_batches", "checksum")
_ERRORS = {"lost": PoolLost, "value": ValueError, "planning": PlanningError}
ERROR_SECONDS = 5.0  # an error's rank stays that long for the others to read it
_ADVICE = "the ranks of a loader must be given the same documents and options"


@dataclass(frozen=True, eq=False)  # and so a key of dictionaries
class Share:
    """What one rank gets of a planned batch.

    Attributes:
        pieces: (document, start, stop, the document's tokens) of every sequence, int64 ``[n, 4]``.
        num_loss_tokens: tokens with a label in the whole batch.
        last: the batch ends its epoch.
        num_batches: batches of the epoch to which the next batch belongs.
        plan: the rank's ``RankPlan`` as bytes.
        checksum: of the documents of a stream that the planning rank chose from.
        segments: (sequence, first token, its position) of the segments of every sequence that has
            several, int64 ``[n, 3]``.
        fields: the kind of each field.
    """

    pieces: np.ndarray
    num_loss_tokens: int
    last: bool
    num_batches: int
    plan: bytes
    checksum: int = 0
    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    fields: Kinds = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        meta = {name: getattr(self, name) for name in _COUNTS} | {"fields": self.fields}
        arrays = {"pieces": self.pieces, "plan": np.frombuffer(self.plan, np.uint8)}
        return wire.pack(_KIND, meta, arrays | {"segments": self.segments})

    @classmethod
    def from_bytes(cls, message: bytes) -> Share:
        """Read a share; raises the error that :func:`error_to_bytes` put in its place."""
        meta, arrays = wire.unpack(_KIND, message)
        with wire.reading(_KIND):
            failed = "error" in meta
            counts, parts = (*_COUNTS, "fields"), ("pieces", "plan", "segments")
            wire.exactly("the share", meta, ("error", "as") if failed else counts)
            wire.exactly("the share", arrays, () if failed else parts)
            if not failed:
                return cls._checked(**arrays, **meta)
            error = _ERRORS[meta["as"]](str(meta["error"]))
        raise error

    @classmethod
    def _checked(
        cls,
        pieces: np.ndarray,
        plan: np.ndarray,
        segments: np.ndarray,
        fields: Any,
        **counts: Any,
    ) -> Share:
        kinds = {name: type(count) for name, count in counts.items()}
        wanted = {name: bool if name == "last" else int for name in _COUNTS}
        require(kinds == wanted and min(counts.values()) >= 0, f"the share counts {counts}")
        require(pieces.ndim == 2 and pieces.shape[1] == 4, f"pieces have shape {pieces.shape}")
        check_columns(("document", "start", "stop", "tokens"), *pieces.T)
        _, start, stop, tokens = pieces.T
        require(((start <= stop) & (stop <= tokens)).all(), "pieces reach beyond their documents")
        wide = segments.ndim == 2 and segments.shape[1] == 3
        require(wide, f"segments have shape {segments.shape}")
        check_columns(("sequence", "first token", "position"), *segments.T)
        in_order = (np.diff(segments[:, 0]) >= 0).all()
        require(in_order and (segments[:, 0] < len(pieces)).all(), "segments name other sequences")
        require(plan.ndim == 1 and plan.dtype == np.uint8, "the plan is not bytes")
        known = {name: (dtype, tuple(shape)) for name, (dtype, shape) in fields.items()}
        require(all(dtype in KINDS for dtype, _ in known.values()), f"fields are {fields}")
        return cls(pieces=pieces, plan=plan.tobytes(), segments=segments, fields=known, **counts)

    def segments_of(self, sequence: int) -> np.ndarray:
        """(first token, its position) of a sequence's segments: int64 ``[n, 2]``."""
        first, stop = np.searchsorted(self.segments[:, 0], [sequence, sequence + 1])
        return self.segments[first:stop, 1:] if stop > first else ONE

    def rank_plan(self) -> RankPlan:
        return RankPlan.from_bytes(self.plan)


def error_to_bytes(error: BaseException, *, rank: int) -> bytes:
    """The error of a planning rank in place of a share: every reader raises its like."""
    kind = next((kind for kind, like in _ERRORS.items() if isinstance(error, like)), "")
    name = "" if kind else f"{type(error).__name__}: "
    text = str(error) if kind == "lost" else f"rank {rank} could not plan: {name}{error}"
    return wire.pack(_KIND, {"error": text, "as": kind or "planning"}, {})


class Exchange:
    """The ranks of a loader, and what passes between them under the key of a batch.

    Shares lie in the store of the group, under a key per batch and rank of the plan. The last to
    read a share deletes it; the last share to go marks the batch as read, for the flow control of
    its planner. Constructing it is collective over ``group``.

    Args:
        group: all ranks; see :func:`resolve_group`. A process alone has nobody to tell.
        attention_group: the group over which this rank's attention runs; None is ``group``. Ranks
            with the same rank in theirs share a plan, which then is in the store once.
        timeout_seconds: how long a share, or another rank, is waited for.

    Attributes:
        rank, num_ranks: of the loader's group.
        plan_ranks: the rank in the plan of each of them; some may share one.
    """

    def __init__(self, group: Any, attention_group: Any, *, timeout_seconds: float) -> None:
        self._group = group = resolve_group(group)
        if group is None and attention_group is not None:
            raise ValueError("attention_group needs group: the ranks that use the loader")
        attention_group = group if attention_group is None else resolve_group(attention_group)
        self.rank, self.num_ranks = _rank_and_size(group)
        self._timeout, self._closed = timeout_seconds, False
        # Two connections: publishing threads never wait behind the caller's.
        self._store, self._outgoing = (self._connect() for _ in range(2))
        mine = [int(np.random.default_rng().integers(1 << 62)), *_rank_and_size(attention_group)]
        found = [each.tolist() for each in self._gather(mine)]
        numbers, plan_ranks, sizes = zip(*found, strict=True)
        self.plan_ranks: tuple[int, ...] = plan_ranks
        if set(sizes) != {max(self.plan_ranks) + 1} or len(set(self.plan_ranks)) != sizes[0]:
            raise ValueError(
                f"attention_group must have the same size on all ranks of group, and a member for "
                f"each of its ranks there: the sizes are {sizes}, the ranks {self.plan_ranks}"
            )
        for store in (self._store, self._outgoing):
            if store is not None:
                store.enter(str(numbers[0]))  # where no other loader is

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Collective: ``ValueError`` on all ranks where a fact differs, None being unknown."""
        group, seconds = self._group, self._timeout
        if group is not None:
            self._meet(
                lambda: Comparison(group, facts, advice=_ADVICE).finish(timeout_seconds=seconds)
            )

    def agree(self, error: Exception | None) -> None:
        """Collective: raises where any rank has an error: its own there, its like elsewhere."""
        own = b"" if error is None else error_to_bytes(error, rank=self.rank)
        first = next(filter(None, self.gather(own)), None)
        if error is not None:
            raise error
        if first is not None:
            Share.from_bytes(first)  # which raises it

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here on one rank fails on all; collective."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self.agree(failed)

    def gather(self, message: bytes) -> list[bytes]:
        """Collective: every rank's message, in the order of ranks."""
        sizes = [int(size) for (size,) in self._gather([len(message)])]
        words = -(-max(sizes) // 8)
        padded = np.frombuffer(message.ljust(8 * words, b"\0"), dtype=np.int64)
        found = self._gather(padded) if words else [padded] * len(sizes)
        return [each.tobytes()[:size] for each, size in zip(found, sizes, strict=True)]

    def largest(self, number: int) -> int:
        """Collective: the largest of all ranks' numbers."""
        return max(int(found) for (found,) in self._gather([number]))

    def publish(self, key: str, messages: Sequence[bytes]) -> None:
        """Leave the other ranks their shares; ``messages[p]`` is that of rank ``p`` of the plan."""
        for plan_rank in self._published_by(self.rank):
            if not self._closed:
                self._outgoing.set(f"{key}/{plan_rank}", messages[plan_rank])

    def fetch(self, key: str, planner: int) -> bytes:
        """Wait for this rank's share from another rank, and take it away."""
        name = self._name(key)
        try:
            if not self._store.wait_for([name], self._timeout):
                raise PlanningError(
                    f"rank {planner} sent no plan within {self._timeout:g} s: it died or stands "
                    f"still, or planning takes longer"
                )
            message = self._store.get(name)
            if message == _WITHDRAWN:
                raise PlanningError(f"rank {planner} has closed its loader: it plans no more")
            self._acknowledge(key, planner)
        except RuntimeError as error:
            raise _lost(error) from None
        return message

    def num_published(self, keys: Sequence[str]) -> int:
        """How many of these batches, up to the first that is not, this rank could fetch now."""
        names = [self._name(key) for key in keys]
        counts = range(1, len(names) + 1)  # "all of the first n are there" holds up to the answer
        try:
            return bisect_left(counts, True, key=lambda n: not self._store.check(names[:n]))
        except RuntimeError as error:
            raise _lost(error) from None

    def was_read(self, key: str, *, wait_seconds: float = 0.0) -> bool:
        """Whether all have fetched a batch that this rank published, now or in that time."""
        if not self._published_by(self.rank):
            return True
        done = f"{key}/done"
        try:
            if not self._store.wait_for([done], wait_seconds):
                if not wait_seconds:
                    return False
                raise PlanningError(
                    f"a rank has not taken its batch for {wait_seconds:g} s: it died, stands "
                    f"still, or is that far behind"
                )
            self._store.delete_key(done)
        except RuntimeError as error:
            raise _lost(error) from None
        return True

    def withdraw(self, key: str) -> None:
        """Take back a published batch that nobody needs.

        A word is left in its place: a rank that reads ahead may have seen it a moment ago, and
        would wait for a key that is gone.
        """
        with suppress(RuntimeError):  # the store is gone, and the batch with it
            for plan_rank in self._published_by(self.rank):
                self._store.set(f"{key}/{plan_rank}", _WITHDRAWN)

    def hand(self, planner: int, number: int, message: bytes) -> None:
        """Leave a planning rank something beside the batches: this rank's ``number``-th message."""
        self._store.set(f"handed/{planner}/{self.rank}/{number}", message)

    def handed(self, rank: int, number: int) -> bytes | None:
        """Take the ``number``-th such message of a rank to this one, if it is there."""
        key = f"handed/{self.rank}/{rank}/{number}"
        if not self._store.check([key]):
            return None
        message: bytes = self._store.get(key)
        self._store.delete_key(key)
        return message

    def close(self) -> None:
        """Publish nothing more: the store may be gone before the last plan is finished."""
        self._closed = True

    def _connect(self) -> Any:
        if self._group is None:
            return None
        store = self._group.get_group_store()
        return PatientStore("dcp-loaders", store, timeout_seconds=self._timeout)

    def _gather(self, numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Every rank's numbers, in the order of ranks."""
        group, seconds = self._group, self._timeout
        if group is None:
            return [np.array(numbers, dtype=np.int64)]
        return self._meet(lambda: Gathering(group, numbers).arrays(timeout_seconds=seconds))

    def _meet(self, collective: Callable[[], Met]) -> Met:
        """What all ranks do together; who does not come is named."""
        try:
            own = self._store.add(f"met/{self.rank}", 1)
            return collective()
        except RuntimeError as error:
            with suppress(RuntimeError):
                count = [self._store.add(f"met/{rank}", 0) for rank in range(self.num_ranks)]
                late = ", ".join(str(rank) for rank, met in enumerate(count) if met < own)
                what = f"rank {late} did not come" if late else "a rank died or stands still"
                error = NoAnswer(f"{what} where all ranks of a loader meet ({_first_line(error)})")
            raise _lost(error) from None

    def _acknowledge(self, key: str, planner: int) -> None:
        """Delete the share after its last reader, and mark the batch after its last share."""
        name, mine = self._name(key), self.plan_ranks[self.rank]
        num_readers = self.plan_ranks.count(mine) - (self.plan_ranks[planner] == mine)
        if num_readers > 1:
            if self._store.add(f"{name}/read", 1) < num_readers:
                return
            self._store.delete_key(f"{name}/read")
        self._store.delete_key(name)
        if self._store.add(f"{key}/read", 1) == len(self._published_by(planner)):
            self._store.delete_key(f"{key}/read")
            self._store.set(f"{key}/done", b"")

    def _published_by(self, planner: int) -> set[int]:
        """Ranks of the plan that somebody other than the planner needs."""
        return {p for rank, p in enumerate(self.plan_ranks) if rank != planner}

    def _name(self, key: str) -> str:
        return f"{key}/{self.plan_ranks[self.rank]}"


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _lost(error: RuntimeError) -> PlanningError:
    """A store that is gone or silent, as the loader's error."""
    if isinstance(error, PlanningError):
        return error
    return PlanningError(f"the loader has lost the other ranks: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
