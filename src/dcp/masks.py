"""Attention masks as unions of disjoint slices.

A slice is a rectangle of (query, key) pairs cut by a band of diagonals: the pair counts when
``q0 <= q < q1``, ``k0 <= k < k1`` and ``lo <= k - q <= hi``. The four kinds of the public
interface are the bands that touch the rectangle's corners:

=============  ===========================================  ============================
kind           which pairs of the rectangle                 band
=============  ===========================================  ============================
``full``       all                                          none
``causal``     at or below the diagonal that ends in the    ``hi = k1 - q1``
               bottom-right corner
``inv_causal`` at or above the diagonal that starts in the  ``lo = k0 - q0``
               top-left corner
``bi_causal``  between the two                              both
=============  ===========================================  ============================

Cutting a slice to a smaller rectangle keeps its band, so that blocks of a mask need no case
analysis: see :func:`restrict_slices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

KINDS = ("full", "causal", "inv_causal", "bi_causal")
Q0, Q1, K0, K1, LO, HI = range(6)


# --------------------------------------------------------------------------- slices as arrays


def slice_area(slices: np.ndarray) -> np.ndarray:
    """Number of pairs in each slice. ``slices`` is int64 ``[n, 6]`` (q0, q1, k0, k1, lo, hi)."""
    q0, q1, k0, k1, lo, hi = slices.T
    height, width = np.maximum(q1 - q0, 0), np.maximum(k1 - k0, 0)

    def up_to(bound: np.ndarray) -> np.ndarray:
        """Pairs of the rectangle with k - q <= bound: a sum of row widths clipped to [0, width]."""
        first = q0 + bound + 1 - k0  # width of the first row before clipping
        return _clipped_sum(first + height, width) - _clipped_sum(first, width)

    return np.maximum(up_to(hi) - up_to(lo - 1), 0)


def _clipped_sum(stop: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Sum of ``clip(t, 0, width)`` over all integers ``t < stop``."""
    inside = np.clip(stop, 0, width)
    return inside * (inside - 1) // 2 + np.maximum(stop - width, 0) * width


def tighten(slices: np.ndarray) -> np.ndarray:
    """Drop empty slices and clip each band and rectangle to what the other leaves."""
    s = slices.copy()
    for _ in range(2):  # the second round sees the first one's smaller rectangles
        s[:, Q0] = np.maximum(s[:, Q0], s[:, K0] - s[:, HI])
        s[:, Q1] = np.minimum(s[:, Q1], s[:, K1] - s[:, LO])
        s[:, K0] = np.maximum(s[:, K0], s[:, Q0] + s[:, LO])
        s[:, K1] = np.minimum(s[:, K1], s[:, Q1] + s[:, HI])
    s[:, LO] = np.maximum(s[:, LO], s[:, K0] - s[:, Q1] + 1)
    s[:, HI] = np.minimum(s[:, HI], s[:, K1] - 1 - s[:, Q0])
    return s[(s[:, Q0] < s[:, Q1]) & (s[:, K0] < s[:, K1]) & (s[:, LO] <= s[:, HI])]


def restrict_slices(slices: np.ndarray, q0: Any, q1: Any, k0: Any, k1: Any) -> np.ndarray:
    """Cut slices to rectangles (scalars or one per slice), coordinates unchanged, none dropped."""
    cut = slices.copy()
    np.maximum(cut[:, Q0], q0, out=cut[:, Q0])
    np.minimum(cut[:, Q1], q1, out=cut[:, Q1])
    np.maximum(cut[:, K0], k0, out=cut[:, K0])
    np.minimum(cut[:, K1], k1, out=cut[:, K1])
    return cut


def shift_slices(slices: np.ndarray, q: Any, k: Any) -> np.ndarray:
    """Move slices by ``q`` queries and ``k`` keys (scalars or one per slice)."""
    moved = slices.copy()
    for column, by in ((Q0, q), (Q1, q), (K0, k), (K1, k), (LO, k - q), (HI, k - q)):
        moved[:, column] += by
    return moved


# --------------------------------------------------------------------------- the mask


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
    def causal(cls, seqlen: int) -> AttnMask:
        """Query ``i`` sees keys ``[0, i]``."""
        return _of(_length(seqlen), [(0, seqlen, 0, seqlen, None, 0)])

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
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        starts = ends - np.asarray(lengths, dtype=np.int64)
        bands = np.stack([starts, ends, starts, ends, starts - ends, 0 * starts], axis=1)
        total = int(ends[-1]) if len(ends) else 0
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
        slices: list[tuple] = []
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
        mask = cls(q_len, k_len, _bands(rows))
        _check_disjoint(mask.bands)
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
        if bad := _first((live & ((start < 0) | (end > k_len))).any(axis=1)):
            raise ValueError(f"query {bad[0]} has a key range outside [0, {k_len})")
        return cls(q_len, k_len, _ranges_to_bands(*_merge_ranges(start, end)))

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
                pieces.append(_dense_to_ranges(np.broadcast_to(seen, (len(rows), k_len))))
        if not pieces:
            return cls(q_len, k_len, _bands([]))
        most = max(piece.shape[1] for piece in pieces)
        padded = [np.pad(p, ((0, 0), (0, most - p.shape[1]), (0, 0))) for p in pieces]
        ranges = np.concatenate(padded)
        return cls(q_len, k_len, _ranges_to_bands(ranges[..., 0], ranges[..., 1]))

    # ------------------------------------------------------------------ what a mask tells

    @property
    def area(self) -> int:
        """Number of (query, key) pairs."""
        return int(slice_area(self.bands).sum())

    @property
    def slices(self) -> list[tuple[int, int, int, int, str]]:
        """The mask as disjoint ``(q0, q1, k0, k1, kind)`` slices."""
        return [piece for band in self.bands.tolist() for piece in _kinds_of_band(*band)]

    def restrict(self, q0: int, q1: int, k0: int, k1: int) -> AttnMask:
        """The mask of queries ``[q0, q1)`` and keys ``[k0, k1)``, renumbered from 0."""
        if not (0 <= q0 <= q1 <= self.q_len and 0 <= k0 <= k1 <= self.k_len):
            raise ValueError(
                f"rectangle ({q0}, {q1}, {k0}, {k1}) lies outside "
                f"{self.q_len} queries x {self.k_len} keys"
            )
        cut = tighten(restrict_slices(self.bands, q0, q1, k0, k1))
        return AttnMask(q1 - q0, k1 - k0, shift_slices(cut, -q0, -k0))

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
    """The mask called ``name`` for one sequence: ``named_mask("streaming", 9000, sink=64)``."""
    if name not in NAMED_MASKS:
        raise ValueError(f"mask {name!r} is not one of {', '.join(NAMED_MASKS)}")
    try:
        return NAMED_MASKS[name](seqlen, **parameters)
    except TypeError as error:
        raise ValueError(f"mask {name!r}: {error}") from None


# --------------------------------------------------------------------------- helpers


def _length(value: int, name: str = "seqlen") -> int:
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return value


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def _bands(rows: Sequence[tuple]) -> np.ndarray:
    """Slices given as (q0, q1, k0, k1, lo, hi) where None means no bound."""
    bands = [
        (q0, q1, k0, k1, k0 - q1 if lo is None else lo, k1 - q0 if hi is None else hi)
        for q0, q1, k0, k1, lo, hi in rows
    ]
    return np.array(bands, dtype=np.int64).reshape(-1, 6)


def _of(seqlen: int, rows: Sequence[tuple]) -> AttnMask:
    bands = restrict_slices(_bands(rows), 0, seqlen, 0, seqlen)
    return AttnMask(seqlen, seqlen, bands)


def _first(flags: np.ndarray | np.bool_) -> list[int]:
    return np.flatnonzero(flags)[:1].tolist()


def _kinds_of_band(q0: int, q1: int, k0: int, k1: int, lo: int, hi: int) -> list[tuple]:
    """One slice cut at the rows where an edge of its band meets an edge of its rectangle."""
    cuts = sorted({q0, q1, *(c for c in (k0 - lo, k1 - hi - 1) if q0 < c < q1)})
    pieces = []
    for a, b in pairwise(cuts):
        start, end = max(k0, a + lo), min(k1, b + hi)
        left, right = start == a + lo and b - a > 1, end == b + hi and b - a > 1
        # a row further down must really move the edge, else the piece is straight on that side
        left, right = left and start + (b - a - 1) > k0, right and end - (b - a - 1) < k1
        kind = KINDS[2 * left + right]
        pieces.append((a, b, start, end, kind))
    return pieces


def _check_disjoint(bands: np.ndarray) -> None:
    """Raise for the first pair of slices that share a (query, key) pair."""
    bands = bands[np.argsort(bands[:, Q0], kind="stable")]
    for i, band in enumerate(bands):
        stop = np.searchsorted(bands[:, Q0], band[Q1])
        shared = restrict_slices(bands[i + 1 : stop], *band[:4])
        shared[:, LO] = np.maximum(shared[:, LO], band[LO])
        shared[:, HI] = np.minimum(shared[:, HI], band[HI])
        if bad := _first(slice_area(shared) * (shared[:, LO] <= shared[:, HI]) > 0):
            one, two = band[:4].tolist(), bands[i + 1 + bad[0], :4].tolist()
            raise ValueError(f"slices overlap: {tuple(one)} and {tuple(two)}; make them disjoint")


def _merge_ranges(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's ranges ``[q_len, R]`` as a sorted union of disjoint ones, empties last."""
    far = np.int64(1) << 60
    empty = end <= start
    start, end = np.where(empty, far, start), np.where(empty, far, end)
    order = np.argsort(start, axis=1, kind="stable")
    start, end = np.take_along_axis(start, order, 1), np.take_along_axis(end, order, 1)
    reach = np.maximum.accumulate(end, axis=1)
    opens = np.ones_like(start, dtype=bool)
    opens[:, 1:] = start[:, 1:] > reach[:, :-1]  # touching ranges become one
    closes = np.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    slot = np.cumsum(opens, axis=1) - 1
    merged_start, merged_end = np.zeros_like(start), np.zeros_like(end)
    merged_start[np.nonzero(opens)[0], slot[opens]] = start[opens]
    merged_end[np.nonzero(closes)[0], slot[closes]] = reach[closes]  # reach never falls
    nothing = merged_start >= far
    return np.where(nothing, 0, merged_start), np.where(nothing, 0, merged_end)


def _ranges_to_bands(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Slices of per-query ranges ``[q_len, R]``: rows whose edges both stand or step join."""
    bands = []
    for column in range(start.shape[1]):
        s, e = start[:, column], end[:, column]
        live = e > s
        step = np.stack([np.diff(s), np.diff(e)], axis=1)
        joins = live[:-1] & live[1:] & ((step == 0) | (step == 1)).all(axis=1)
        same = np.ones_like(joins)
        same[1:] = ~joins[:-1] | (step[1:] == step[:-1]).all(axis=1)
        first = np.concatenate([live[:1], live[1:] & ~(joins & same)])
        q0 = np.flatnonzero(first)
        if not len(q0):
            continue
        q1 = np.append(q0[1:], len(s))
        dead = np.append(np.flatnonzero(~live), len(s))
        q1 = np.minimum(q1, dead[np.searchsorted(dead, q0)])
        k0, k1 = s[q0], e[q1 - 1]
        lo = np.where(s[q1 - 1] > k0, k0 - q0, k0 - q1)
        hi = np.where(e[q0] < k1, k1 - q1, k1 - q0)
        bands.append(np.stack([q0, q1, k0, k1, lo, hi], axis=1))
    return np.concatenate(bands) if bands else _bands([])


def _dense_to_ranges(dense: np.ndarray) -> np.ndarray:
    """Boolean ``[rows, k_len]`` as half-open runs ``[rows, most runs of a row, 2]``."""
    edges = np.diff(np.pad(dense.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row, start = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[1]
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    ranges = np.zeros((len(dense), int(slot.max(initial=-1)) + 1, 2), dtype=np.int64)
    ranges[row, slot, 0], ranges[row, slot, 1] = start, end
    return ranges


def _index_backend() -> Callable[[np.ndarray], Any]:
    try:
        import torch
    except ImportError:
        return lambda array: array
    return torch.from_numpy
