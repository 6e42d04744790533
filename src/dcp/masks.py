"""Attention masks as unions of disjoint slices (see :mod:`dcp.slices`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dcp.ragged import starts
from dcp.slices import (
    KINDS,
    SliceRow,
    check_disjoint,
    dense_to_ranges,
    first_true,
    kinds_of_slice,
    make_slices,
    merge_ranges,
    ranges_to_slices,
    restrict_slices,
    slice_area,
    tighten,
)


class AttnMask:
    """Which (query, key) pairs count: a union of disjoint slices over ``q_len`` x ``k_len``.

    Make one with a named constructor (:meth:`causal`, :meth:`streaming`, …), from slices, from
    key ranges per query, or from a FlexAttention mask function. Masks are values: comparable,
    hashable, never changed.
    """

    __slots__ = ("bands", "k_len", "q_len")

    def __init__(self, q_len: int, k_len: int, bands: np.ndarray) -> None:
        """``bands``: int64 ``[n, 6]`` disjoint slices; see the module's table. Trusted input."""
        self.q_len, self.k_len = int(q_len), int(k_len)
        self.bands = tighten(np.asarray(bands, dtype=np.int64).reshape(-1, 6))
        self.bands.setflags(write=False)

    # ------------------------------------------------------------------ constructors

    @classmethod
    def full(cls, seqlen: int) -> AttnMask:
        """Every query sees every key."""
        return _of(_length(seqlen), [(0, seqlen, 0, seqlen, None, None)])

    @classmethod
    def causal(cls, seqlen: int, cached: int = 0) -> AttnMask:
        """Query ``i`` sees keys ``[0, i]``.

        The first ``cached`` tokens have no queries: those of the others are numbered from 0, and
        query ``i`` sees keys ``[0, cached + i]``.
        """
        if not 0 <= cached <= _length(seqlen):
            raise ValueError(f"cached must lie in [0, {seqlen}], the seqlen, got {cached}")
        new = seqlen - cached
        return cls(new, seqlen, make_slices([(0, new, 0, seqlen, None, cached)]))

    @classmethod
    def sliding_window(cls, seqlen: int, window: int) -> AttnMask:
        """Query ``i`` sees its last ``window`` keys, itself included: ``[i - window + 1, i]``."""
        _positive("window", window)
        return _of(_length(seqlen), [(0, seqlen, 0, seqlen, 1 - window, 0)])

    @classmethod
    def prefix_lm(cls, seqlen: int, prefix: int) -> AttnMask:
        """The first ``prefix`` tokens see each other; later ones are causal."""
        p = min(_length(prefix, "prefix"), _length(seqlen))
        return _of(seqlen, [(0, p, 0, p, None, None), (p, seqlen, 0, seqlen, None, 0)])

    @classmethod
    def streaming(cls, seqlen: int, sink: int = 64, window: int = 4096) -> AttnMask:
        """Lambda mask (StreamingLLM): the first ``sink`` tokens and the last ``window``.

        Query ``i`` sees ``[0, sink) ∪ [i - window + 1, i]``, causally.
        """
        _length(sink, "sink")
        _positive("window", window)
        return _of(
            _length(seqlen),
            [(0, seqlen, 0, seqlen, 1 - window, 0), (0, seqlen, 0, sink, None, -window)],
        )

    @classmethod
    def causal_blockwise(cls, seqlen: int, block: int = 256, local_blocks: int = 2) -> AttnMask:
        """In-context learning mask: sink block, sliding local blocks, dense last block.

        With blocks of ``block`` tokens: the first block is causal; the last block sees all before
        it; a query ``i`` between sees the first block and ``[i - local_blocks * block, i]``. The
        window slides by the token (the paper's figure aligns it to blocks, its code does not).
        """
        _positive("block", block)
        _length(local_blocks, "local_blocks")
        first = min(block, _length(seqlen))
        last = max(first, (seqlen - 1) // block * block)
        return _of(
            seqlen,
            [
                (0, first, 0, first, None, 0),
                (first, last, 0, first, None, None),
                (first, last, first, last, -local_blocks * block, 0),
                (last, seqlen, 0, seqlen, None, 0),
            ],
        )

    @classmethod
    def shared_question(
        cls, seqlen: int, question_fraction: float = 0.2, num_answers: int = 4
    ) -> AttnMask:
        """One question, several answers that see it and themselves but not each other (DPO, RLHF).

        The question takes ``int(seqlen * question_fraction)`` tokens, the answers equal shares of
        the rest; the last answer takes the remainder.
        """
        _positive("num_answers", num_answers)
        if not 0 <= question_fraction <= 1:
            raise ValueError(f"question_fraction must lie in [0, 1], got {question_fraction}")
        question = int(_length(seqlen) * question_fraction)
        answer = (seqlen - question) // num_answers
        starts = question + answer * np.arange(num_answers + 1)
        starts[-1] = seqlen
        slices = [(0, question, 0, question, None, 0), (question, seqlen, 0, question, None, None)]
        slices += [(a, b, a, b, None, 0) for a, b in pairwise(starts.tolist())]
        return _of(seqlen, slices)

    @classmethod
    def documents(cls, lengths: Sequence[int]) -> AttnMask:
        """Documents packed one after another, causal inside each."""
        for length in lengths:
            _length(length, "document length")
        sizes = np.asarray(lengths, dtype=np.int64)
        start, total = starts(sizes), int(sizes.sum())
        end = start + sizes
        bands = np.stack([start, end, start, end, -sizes, 0 * start], axis=1)
        return cls(total, total, bands)

    @classmethod
    def modality(
        cls,
        text_lengths: Sequence[int],
        image_size: int,
        image_sees_only_itself: bool = False,
    ) -> AttnMask:
        """Text and images in turn: text causal, image runs bidirectional.

        The sequence is ``text_lengths[0]``, an image of ``image_size`` tokens,
        ``text_lengths[1]``, an image, … and ends with the last text (lengths may be 0). An image
        token sees all before its image and the whole image, or the image alone.
        """
        _length(image_size, "image_size")
        slices: list[SliceRow] = []
        start = 0
        for index, length in enumerate(text_lengths):
            if index:
                end = start + image_size
                slices.append((start, end, start if image_sees_only_itself else 0, end, None, None))
                start = end
            end = start + _length(length, "text length")
            slices.append((start, end, 0, end, None, 0))
            start = end
        return _of(start, slices)

    @classmethod
    def from_slices(
        cls, q_len: int, k_len: int, slices: Iterable[tuple[int, int, int, int, str]]
    ) -> AttnMask:
        """Mask of disjoint ``(q0, q1, k0, k1, kind)`` slices; out of range or overlapping raise."""
        _length(q_len, "q_len"), _length(k_len, "k_len")
        rows = []
        for q0, q1, k0, k1, kind in slices:
            if kind not in KINDS:
                raise ValueError(f"slice kind {kind!r} is not one of {', '.join(KINDS)}")
            if not (0 <= q0 <= q1 <= q_len and 0 <= k0 <= k1 <= k_len):
                raise ValueError(
                    f"slice ({q0}, {q1}, {k0}, {k1}) lies outside {q_len} queries x {k_len} keys"
                )
            lo = k0 - q0 if kind in ("inv_causal", "bi_causal") else None
            hi = k1 - q1 if kind in ("causal", "bi_causal") else None
            rows.append((q0, q1, k0, k1, lo, hi))
        mask = cls(q_len, k_len, make_slices(rows))
        check_disjoint(mask.bands)
        return mask

    @classmethod
    def from_ranges(cls, ranges: Any, k_len: int | None = None) -> AttnMask:
        """Mask of ``[q_len, R, 2]`` half-open key ranges per query, any R; ranges mean their union.

        ``ranges`` is an integer array or tensor (``[q_len, 2]`` counts as R = 1); empty ranges are
        those with end <= start. ``k_len`` defaults to ``q_len``.
        """
        array = np.asarray(ranges)
        if array.ndim == 2:
            array = array[:, None, :]
        if array.ndim != 3 or array.shape[2] != 2 or array.dtype.kind not in "iu":
            raise ValueError(
                f"ranges must be integers of shape [q_len, R, 2], got {array.dtype} {array.shape}"
            )
        q_len = len(array)
        k_len = q_len if k_len is None else _length(k_len, "k_len")
        start, end = array[..., 0].astype(np.int64), array[..., 1].astype(np.int64)
        live = end > start
        if bad := first_true((live & ((start < 0) | (end > k_len))).any(axis=1)):
            raise ValueError(f"query {bad[0]} has a key range outside [0, {k_len})")
        return cls(q_len, k_len, ranges_to_slices(*merge_ranges(start, end)))

    @classmethod
    def from_mask_mod(cls, fn: Callable[..., Any], q_len: int, k_len: int) -> AttnMask:
        """Mask of a FlexAttention ``mask_mod``: ``fn(b, h, q, kv) -> bool``, called with b = h = 0.

        Every pair is evaluated, a band of rows at a time: time grows with ``q_len * k_len``, so
        prefer a named constructor for very long sequences. ``fn`` gets index tensors when torch is
        installed, else numpy arrays.
        """
        _length(q_len, "q_len"), _length(k_len, "k_len")
        index = _index_backend()
        pieces, zero = [], index(np.zeros((1, 1), dtype=np.int64))
        keys = index(np.arange(k_len, dtype=np.int64)[None, :])
        step = max(1, (1 << 22) // max(k_len, 1))
        for row in range(0, q_len, step):
            rows = np.arange(row, min(row + step, q_len), dtype=np.int64)[:, None]
            seen = np.asarray(fn(zero, zero, index(rows), keys)).astype(bool)
            if k_len:
                pieces.append(dense_to_ranges(np.broadcast_to(seen, (len(rows), k_len))))
        if not pieces:
            return cls(q_len, k_len, make_slices([]))
        most = max(piece.shape[1] for piece in pieces)
        padded = [np.pad(p, ((0, 0), (0, most - p.shape[1]), (0, 0))) for p in pieces]
        ranges = np.concatenate(padded)
        return cls(q_len, k_len, ranges_to_slices(ranges[..., 0], ranges[..., 1]))

    # ------------------------------------------------------------------ what a mask tells

    @property
    def area(self) -> int:
        """Number of (query, key) pairs."""
        return int(slice_area(self.bands).sum())

    @property
    def slices(self) -> list[tuple[int, int, int, int, str]]:
        """The mask as disjoint ``(q0, q1, k0, k1, kind)`` slices."""
        return [piece for band in self.bands.tolist() for piece in kinds_of_slice(*band)]

    def to_dense(self) -> np.ndarray:
        """Boolean ``[q_len, k_len]``, true where the query sees the key."""
        dense = np.zeros((self.q_len, self.k_len), dtype=bool)
        for q0, q1, k0, k1, lo, hi in self.bands.tolist():
            diagonal = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
            dense[q0:q1, k0:k1] |= (lo <= diagonal) & (diagonal <= hi)
        return dense

    def draw(self, width: int = 64) -> str:
        """A picture in characters: █ all pairs of the cell count, ░ some do, · none."""
        rows = max(1, min(width, self.q_len) // 2)
        q = np.linspace(0, self.q_len, rows + 1).astype(np.int64)
        k = np.linspace(0, self.k_len, max(1, min(width, self.k_len)) + 1).astype(np.int64)
        area = np.zeros((len(q) - 1, len(k) - 1), dtype=np.int64)
        for i, j in np.ndindex(area.shape):
            area[i, j] = slice_area(
                restrict_slices(self.bands, q[i], q[i + 1], k[j], k[j + 1])
            ).sum()
        size = np.diff(q)[:, None] * np.diff(k)[None, :]
        cells = np.where(area == 0, "·", np.where(area == size, "█", "░"))
        return "\n".join("".join(row) for row in cells)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, int, bytes]:
        order = np.lexsort(self.bands.T[::-1])
        return self.q_len, self.k_len, self.bands[order].tobytes()

    def __repr__(self) -> str:
        size = f"{self.q_len} x {self.k_len}"
        return f"AttnMask({size}, {len(self.bands)} slices, area {self.area})"


NAMED_MASKS: dict[str, Callable[..., AttnMask]] = {
    "full": AttnMask.full,
    "causal": AttnMask.causal,
    "sliding_window": AttnMask.sliding_window,
    "streaming": AttnMask.streaming,
    "causal_blockwise": AttnMask.causal_blockwise,
    "shared_question": AttnMask.shared_question,
    "prefix_lm": AttnMask.prefix_lm,
}


def named_mask(name: str, seqlen: int, **parameters: Any) -> AttnMask:
    """The mask called ``name`` for one sequence: ``named_mask("streaming", 9000, sink=64)``.

    Parameters may stand in the name, too: ``named_mask("streaming:sink=64,window=512", 9000)``.
    """
    name, given = parse_mask(name)
    parameters = given | parameters
    if name not in NAMED_MASKS:
        raise ValueError(f"mask {name!r} is not one of {', '.join(NAMED_MASKS)}")
    try:
        return NAMED_MASKS[name](seqlen, **parameters)
    except TypeError as error:
        raise ValueError(f"mask {name!r}: {error}") from None


def parse_mask(text: str) -> tuple[str, dict[str, Any]]:
    """``"streaming:sink=64,window=4096"`` -> ``("streaming", {"sink": 64, "window": 4096})``."""
    name, _, rest = text.partition(":")
    parameters: dict[str, int | float] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        try:
            parameters[key.strip()] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"mask parameter {item!r} is not KEY=NUMBER") from None
    return name, parameters


def _length(value: int, name: str = "seqlen") -> int:
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return value


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def _of(seqlen: int, rows: Sequence[SliceRow]) -> AttnMask:
    bands = restrict_slices(make_slices(rows), 0, seqlen, 0, seqlen)
    return AttnMask(seqlen, seqlen, bands)


def _index_backend() -> Callable[[np.ndarray], Any]:
    try:
        import torch
    except ImportError:
        return lambda array: array
    return torch.from_numpy
