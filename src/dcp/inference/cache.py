"""Keys and values of many sequences on one rank: pages of one pool, kept over all turns."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcp.batch import AttentionSpec
from dcp.ragged import runs
from dcp.received import MOST, require, within
from dcp.wire import exactly, pack, reading, record, unpack

SequenceId = Hashable
_SHAPE = ("num_layers", "num_pages", "page_size", "rank", "num_ranks")


@dataclass
class _Sequence:
    """One sequence: its pages here, and how many tokens every rank holds of it."""

    pages: list[int]
    held: np.ndarray


class KVCache:
    """A pool of pages per layer, and which sequence each page belongs to.

    A token's keys and values stay in the row where they were written. Every rank knows how many
    tokens each rank holds, so that all of them find a cache full, or plan a turn, alike.

    Args:
        num_pages, page_size: rows are ``num_pages * page_size`` tokens per layer on this rank. All
            ranks have as many.
        rank, num_ranks: which of the ranks this is.

    Attributes:
        pools: of each layer, ``[rows, 2, num_kv_heads, head_dim]``.
        note: kept with what is saved; says what else belongs to it.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int = 256,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.spec, self.rank, self.num_ranks = spec, rank, num_ranks
        self.num_pages, self.page_size = num_pages, page_size
        shape = (num_pages * page_size, 2, spec.num_kv_heads, spec.head_dim)
        dtype = getattr(torch, spec.dtype)
        try:
            self.pools = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        except RuntimeError:  # torch's for want of memory, and for sizes beyond any
            size = prod(shape) * spec.dtype_bytes * num_layers / 2**30
            raise ValueError(
                f"the KV cache of num_pages={num_pages} and page_size={page_size} takes "
                f"{size:,.1f} GiB on each rank, more than {device} has: make it with fewer pages"
            ) from None
        self._free = list(range(num_pages))  # a heap: low pages first, so that runs are long
        self._sequences: dict[SequenceId, _Sequence] = {}
        self.note = ""

    # ------------------------------------------------------------------ what is there

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments that it was made with, plain enough for JSON."""
        return {
            "spec": asdict(self.spec),
            "num_layers": len(self.pools),
            "num_pages": self.num_pages,
            "page_size": self.page_size,
            "rank": self.rank,
            "num_ranks": self.num_ranks,
        }

    @property
    def sequences(self) -> list[SequenceId]:
        """Sequences with cached tokens, in the order in which they came."""
        return list(self._sequences)

    def held(self, sequences: Sequence[SequenceId]) -> np.ndarray:
        """Tokens of each sequence on each rank, int64 ``[n, num_ranks]``; 0 for unknown ones."""
        none = np.zeros(self.num_ranks, dtype=np.int64)
        rows = [self._sequences[s].held if s in self._sequences else none for s in sequences]
        return np.array(rows, dtype=np.int64).reshape(-1, self.num_ranks)

    @property
    def free_pages(self) -> np.ndarray:
        """Free pages of every rank, int64 ``[num_ranks]``."""
        return self.num_pages - self._pages(self.held(self.sequences)).sum(axis=0)

    def row_runs(self, sequences: Sequence[SequenceId]) -> tuple[np.ndarray, np.ndarray]:
        """This rank's rows of the sequences, in order: first row and length of every run."""
        start, length = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for each in sequences:
            if each in self._sequences:
                known = self._sequences[each]
                first = np.arange(len(known.pages)) * self.page_size
                start.append(np.array(known.pages, dtype=np.int64) * self.page_size)
                length.append(np.minimum(known.held[self.rank] - first, self.page_size))
        return np.concatenate(start), np.concatenate(length)

    def rows(self, sequences: Sequence[SequenceId]) -> np.ndarray:
        """This rank's rows of the sequences, each sequence in the order of writing: int64."""
        return runs(*self.row_runs(sequences))

    # ------------------------------------------------------------------ what changes

    def extend(self, sequences: Sequence[SequenceId], new: np.ndarray) -> np.ndarray:
        """Make room for new tokens of some sequences; returns their rows here, int64.

        ``new``: of each sequence on each rank, int64 ``[n, num_ranks]``.

        Raises ``ValueError`` where any rank's pages do not suffice, on all ranks alike, and leaves
        everything as it was.
        """
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"a sequence is named twice: {list(sequences)}")
        before, new = self.held(sequences), np.asarray(new)
        if new.shape != before.shape or new.dtype.kind not in "iu" or (new < 0).any():
            raise ValueError(
                f"new must be int {list(before.shape)} of 0 or more (sequences, ranks), "
                f"got {new.tolist()}"
            )
        pages = self._pages(before + new) - self._pages(before)
        lacking = pages.sum(axis=0) - self.free_pages
        if (lacking > 0).any():
            rank = int(lacking.argmax())
            raise ValueError(
                f"the KV cache is full: rank {rank} needs {pages[:, rank].sum()} more pages of "
                f"{self.page_size} tokens and has {self.free_pages[rank]} of {self.num_pages}: "
                "evict a sequence, or make the cache with more pages"
            )
        rows = [np.zeros(0, dtype=np.int64)]
        for each, had, adds, more in zip(sequences, before, new, pages[:, self.rank], strict=True):
            known = self._sequences.setdefault(each, _Sequence([], had))
            known.pages += [heapq.heappop(self._free) for _ in range(more)]
            known.held = had + adds
            page, row = np.divmod(had[self.rank] + np.arange(adds[self.rank]), self.page_size)
            rows.append(np.array(known.pages, dtype=np.int64)[page] * self.page_size + row)
        return np.concatenate(rows)

    def undo(self, before: dict[SequenceId, np.ndarray]) -> None:
        """Take back what was added since :meth:`extent` said ``before``."""
        for each in list(self._sequences):
            known = self._sequences[each]
            if each not in before:
                self.evict(each)
                continue
            known.held = before[each]
            kept = int(self._pages(known.held[self.rank]))
            for page in known.pages[kept:]:
                heapq.heappush(self._free, page)
            del known.pages[kept:]

    def extent(self) -> dict[SequenceId, np.ndarray]:
        """How many tokens each rank holds of each sequence, for :meth:`undo`."""
        return {each: known.held for each, known in self._sequences.items()}

    def evict(self, sequence: SequenceId) -> None:
        """Forget a sequence; its pages are free again. ``ValueError`` for an unknown one."""
        if sequence not in self._sequences:
            raise ValueError(f"sequence {sequence!r} is not in the cache")
        for page in self._sequences.pop(sequence).pages:
            heapq.heappush(self._free, page)

    def _pages(self, tokens: np.ndarray) -> np.ndarray:
        return -(-tokens // self.page_size)

    # ------------------------------------------------------------------ on disk

    def save(self, path: str | Path) -> None:
        """Write this rank's sequences to a file that :meth:`load` reads.

        Sequences must be named by strings or integers.
        """
        names = self.sequences
        if unnamed := [name for name in names if type(name) not in (str, int)]:
            raise ValueError(f"only sequences named by str or int can be saved, not {unnamed[0]!r}")
        index = torch.from_numpy(self.rows(names))
        meta = self.shape | {"sequences": names, "note": self.note}
        arrays = {"held": self.held(names)}
        for layer, pool in enumerate(self.pools):
            values = pool[index.to(pool.device)].cpu().view(torch.uint8)
            arrays[f"layer {layer}"] = values.numpy()
        Path(path).write_bytes(pack("kv-cache", meta, arrays))

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> KVCache:
        """Read what :meth:`save` wrote; :class:`dcp.wire.WireError` for anything else."""
        meta, arrays = unpack("kv-cache", Path(path).read_bytes())
        with reading("kv-cache"):
            return cls._read(meta, arrays, device)

    @classmethod
    def _read(
        cls, meta: dict[str, Any], arrays: dict[str, np.ndarray], device: torch.device | str
    ) -> KVCache:
        exactly("the cache", meta, (*_SHAPE, "spec", "sequences", "note"))
        names, spec = meta["sequences"], record(AttentionSpec, meta["spec"])
        shape = {name: meta[name] for name in _SHAPE}
        counts = all(type(count) is int and 0 <= count < MOST for count in shape.values())
        require(counts and type(meta["note"]) is str, f"its shape is {shape}")
        rank, num_ranks, pages = shape["rank"], shape["num_ranks"], shape["num_pages"]
        layers = [f"layer {layer}" for layer in range(len(arrays) - 1)]
        require(shape["num_layers"] == len(layers), f"its shape is {shape}")
        exactly("the cache", arrays, ["held", *layers])
        named = all(type(name) in (str, int) for name in names) and len(set(names)) == len(names)
        require(named, f"its sequences are named {names!r:.100}")
        held = arrays["held"]
        tokens = (len(names), num_ranks)
        require(
            held.shape == tokens and within(held, 0, MOST), f"it holds {held.shape} of {tokens}"
        )
        require(0 <= rank < num_ranks, f"its shape is {shape}")
        here = int(held[:, rank].sum())
        values = (here, 2, spec.num_kv_heads, spec.head_dim * spec.dtype_bytes)
        fits = all(arrays[name].shape == values for name in layers)
        fits &= all(arrays[name].dtype == np.uint8 for name in layers)
        require(fits, "the tables of the cache do not fit each other")
        used = -(-held // max(shape["page_size"], 1)).sum(axis=0)
        require((used <= pages).all(), f"it holds more than its {pages} pages")
        cache = cls(spec, device=device, **shape)
        cache.note = meta["note"]
        rows = torch.from_numpy(cache.extend(names, held)).to(device)
        for pool, name in zip(cache.pools, layers, strict=True):
            pool[rows] = torch.from_numpy(arrays[name].copy()).view(pool.dtype).to(device)
        return cache
