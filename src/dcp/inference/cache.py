"""Keys and values of many sequences on one rank: pages of one pool, kept over all turns."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcp.batch import AttentionSpec
from dcp.ragged import runs
from dcp.wire import WireError, pack, unpack

SequenceId = Hashable


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
        self.pools = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._free = list(range(num_pages))  # a heap: low pages first, so that runs are long
        self._sequences: dict[SequenceId, _Sequence] = {}

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
        before = self.held(sequences)
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
        if unnamed := [name for name in names if not isinstance(name, str | int)]:
            raise ValueError(f"only sequences named by str or int can be saved, not {unnamed[0]!r}")
        index = torch.from_numpy(self.rows(names))
        meta = self.shape | {"sequences": names}
        arrays = {"held": self.held(names)}
        for layer, pool in enumerate(self.pools):
            values = pool[index.to(pool.device)].cpu().view(torch.uint8)
            arrays[f"layer {layer}"] = values.numpy()
        Path(path).write_bytes(pack("kv-cache", meta, arrays))

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> KVCache:
        """Read what :meth:`save` wrote; :class:`dcp.wire.WireError` for anything else."""
        meta, arrays = unpack("kv-cache", Path(path).read_bytes())
        names = meta.pop("sequences")
        spec = AttentionSpec(**meta.pop("spec"))
        cache = cls(spec, device=device, **meta)
        held = arrays["held"]
        layers = [arrays[f"layer {layer}"] for layer in range(len(cache.pools))]
        if held.shape != (len(names), cache.num_ranks) or any(
            len(values) != held[:, cache.rank].sum() for values in layers
        ):
            raise WireError(f"{path}: the tables of the cache do not fit each other")
        rows = torch.from_numpy(cache.extend(names, held)).to(device)
        for pool, values in zip(cache.pools, layers, strict=True):
            pool[rows] = torch.from_numpy(values.copy()).view(pool.dtype).to(device)
        return cache
