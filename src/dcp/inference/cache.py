"""Keys and values of many sequences on one rank: pages of pools, kept over all turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcp.batch import AttentionSpec
from dcp.inference.books import Books
from dcp.inference.held import MOST_RANKS, SequenceId
from dcp.inference.reach import Reach
from dcp.inference.stored import from_arrays, names_of_arrays, to_arrays
from dcp.received import MOST, require
from dcp.wire import exactly, pack, reading, record, unpack

__all__ = ["KVCache", "SequenceId"]
_COUNTS = ("num_layers", "num_pages", "window_pages", "page_size", "rank", "num_ranks")


class KVCache(Books):
    """A pool of pages per layer, and which sequences each page belongs to.

    A token's keys and values stay in the row where they were written. Every rank knows which tokens
    each rank holds, so that all of them find a cache full, or plan a turn, alike.

    Args:
        num_pages, page_size: rows are ``num_pages * page_size`` tokens per layer on this rank. All
            ranks have as many.
        reach: how far back each layer sees; by default all layers see all. What a layer cannot see
            any more is forgotten, and its pages are free again.
        window_pages: ``num_pages`` of layers that do not see all; by default the same. A prompt
            that is read in one turn needs pages for all its tokens in these layers, too.
        rank, num_ranks: which of the ranks this is.

    Attributes:
        pools: of each layer, ``[rows, 2, num_kv_heads, head_dim]``.
        layers: the kind of each layer, an index of :attr:`kinds`.
        kinds: how far back the layers of each kind see.
        note: kept with what is saved; says what else belongs to it.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int = 256,
        reach: Sequence[Reach] | None = None,
        window_pages: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.window_pages = num_pages if window_pages is None else window_pages
        for name, value in (
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("window_pages", self.window_pages),
        ):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        reach = [Reach()] * num_layers if reach is None else reach
        if len(reach) != num_layers:
            raise ValueError(f"reach is of {len(reach)} layers, there are {num_layers}")
        self.spec, self.num_pages = spec, num_pages
        kinds = list(dict.fromkeys(reach)) or [Reach()]
        self.layers = [kinds.index(of) for of in reach]
        counts = [num_pages if of.is_all else self.window_pages for of in kinds]
        super().__init__(kinds, counts, page_size=page_size, rank=rank, num_ranks=num_ranks)
        dtype = getattr(torch, spec.dtype)
        shapes = [
            (counts[kind] * page_size, 2, spec.num_kv_heads, spec.head_dim) for kind in self.layers
        ]
        try:
            self.pools = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        except RuntimeError:  # torch's for want of memory, and for sizes beyond any
            size = sum(map(prod, shapes)) * spec.dtype_bytes / 2**30
            raise ValueError(
                f"the KV cache of num_pages={num_pages} and page_size={page_size} takes "
                f"{size:,.1f} GiB on each rank, more than {device} has: make it with fewer pages"
            ) from None
        self.note = ""

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments that it was made with, plain enough for JSON."""
        return {
            "spec": asdict(self.spec),
            "reach": [asdict(self.kinds[kind]) for kind in self.layers],
            "num_layers": len(self.pools),
            "num_pages": self.num_pages,
            "window_pages": self.window_pages,
            "page_size": self.page_size,
            "rank": self.rank,
            "num_ranks": self.num_ranks,
        }

    def share(self, from_: SequenceId, to: SequenceId, *, num_tokens: int) -> None:
        """Let the unknown sequence ``to`` begin with the first ``num_tokens`` tokens of ``from_``.

        Full pages, which are never written again, then belong to both and take no memory twice. The
        last page may be gone on with by both, so ``to`` gets its own copy of its rows at once.
        Either sequence may then go on or be evicted without the other. On all ranks alike.

        Raises ``ValueError`` for sequences that do not fit; for tokens that layers of windows or
        chunks have forgotten (:meth:`keeps`); and where pages do not suffice, one a rank and kind
        at most. Then nothing is changed.
        """
        copies = self.share_pages(from_, to, num_tokens=num_tokens)
        for pool, kind in zip(self.pools, self.layers, strict=True):
            page, copy, count = copies[kind]
            old, new = page * self.page_size, copy * self.page_size
            pool[new : new + count] = pool[old : old + count]

    # ------------------------------------------------------------------ on disk

    def save(self, path: str | Path) -> None:
        """Write this rank's sequences to a file that :meth:`load` reads.

        Sequences must be named by strings or integers.
        """
        names = self.sequences
        if unnamed := [name for name in names if type(name) not in (str, int)]:
            raise ValueError(f"only sequences named by str or int can be saved, not {unnamed[0]!r}")
        meta = self.shape | {"sequences": names, "note": self.note}
        arrays = to_arrays(self)
        for layer, (pool, kind) in enumerate(zip(self.pools, self.layers, strict=True)):
            rows = torch.from_numpy(self._used_rows(kind)).to(pool.device)
            values = pool[rows].cpu().view(torch.uint8)
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
        exactly("the cache", meta, (*_COUNTS, "spec", "reach", "sequences", "note"))
        names, spec = meta["sequences"], record(AttentionSpec, meta["spec"])
        counts = {name: meta[name] for name in _COUNTS}
        ok = all(type(count) is int and 0 <= count < MOST for count in counts.values())
        require(ok and type(meta["note"]) is str, f"its shape is {counts}")
        require(0 <= counts["rank"] < counts["num_ranks"] <= MOST_RANKS, f"its shape is {counts}")
        named = all(type(name) in (str, int) for name in names) and len(set(names)) == len(names)
        require(named, f"its sequences are named {names!r:.100}")
        reach = [record(Reach, of) for of in meta["reach"]]
        layers = [f"layer {layer}" for layer in range(len(reach))]
        exactly("the cache", arrays, names_of_arrays(len(set(reach)) or 1) + layers)
        cache = cls(spec, reach=reach, device=device, **counts)
        cache.note = meta["note"]
        from_arrays(cache, names, arrays)
        width = spec.head_dim * spec.dtype_bytes
        for pool, kind, name in zip(cache.pools, cache.layers, layers, strict=True):
            rows, values = cache._used_rows(kind), arrays[name]
            wanted = (len(rows), 2, spec.num_kv_heads, width)
            fits = values.shape == wanted and values.dtype == np.uint8
            require(fits, "the tables of the cache do not fit each other")
            if len(rows):  # torch cannot view nothing as another dtype
                found = torch.from_numpy(values.copy()).view(pool.dtype)
                pool[torch.from_numpy(rows).to(device)] = found.to(device)
        return cache

    def _used_rows(self, kind: int) -> np.ndarray:
        """This rank's rows of all sequences, each once, ascending."""
        rows: np.ndarray = np.unique(self.rows(self.sequences, kind))
        return rows
