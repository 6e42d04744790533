"""Attention masks as unions of disjoint slices (see :mod:`dcp.slices`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dcp.checks import not_too_many, number, one_of, shown, whole, whole_numbers
from dcp.mask_mod import ranges_of
from dcp.mask_names import parse_mask
from dcp.packing import (
    MOST_SLICES,
    MOST_TOKENS,
    Segments,
    checked_segments,
    packed_runs,
    size,
    tokens_of,
    triangles,
)
from dcp.slices import (
    SliceRow,
    check_disjoint,
    first_true,
    kinds_of_slice,
    make_slices,
    merge_ranges,
    picture,
    ranges_to_slices,
    read_ranges,
    restrict_slices,
    slice_area,
    slices_of_kinds,
    tighten,
)

MOST_CELLS = 2**32  # of a mask written out pair by pair


class AttnMask:
    """Which (query, key) pairs count: a union of disjoint slices over ``q_len`` x ``k_len``.

    Make one with a named constructor (:meth:`causal`, :meth:`streaming`, …), from slices, from
    key ranges per query, or from a FlexAttention mask function. Masks are values: comparable,
    hashable, never changed. Equal masks have the same slices and the same segments.

    A mask knows the *segments* of its sequence, int64 ``[n, 2]``: rows (first token, position of
    that token), ascending; ``[[0, 0]]`` where all is one. A token's position is its segment's and
    its offset in it. A token whose successor begins another segment predicts nothing. Constructors
    that pack give them; ``segments=`` says it of a mask of one's own.

    Constructors raise ``ValueError`` for what is no whole number where one is due, out of range,
    or a sequence of more than :data:`MOST_TOKENS` tokens.
    """

    __slots__ = ("bands", "k_len", "q_len", "segments")

    def __init__(
        self, q_len: int, k_len: int, bands: np.ndarray, segments: Segments = None
    ) -> None:
        """``bands``: int64 ``[n, 6]`` disjoint slices; see the module's table. Trusted input."""
        self.q_len, self.k_len = int(q_len), int(k_len)
        self.bands = tighten(np.asarray(bands, dtype=np.int64).reshape(-1, 6))
        self.bands.setflags(write=False)
        self.segments = checked_segments(segments, max(self.q_len, self.k_len))
        self.segments.setflags(write=False)

    # ------------------------------------------------------------------ constructors

    @classmethod
    def full(cls, seqlen: int) -> AttnMask:
        """Every query sees every key."""
        seqlen = tokens_of(seqlen)
        return _of(seqlen, [(0, seqlen, 0, seqlen, None, None)])

    @classmethod
    def causal(cls, seqlen: int, cached: int = 0) -> AttnMask:
        """Query ``i`` sees keys ``[0, i]``.

        The first ``cached`` tokens have no queries: those of the others are numbered from 0, and
        query ``i`` sees keys ``[0, cached + i]``.
        """
        seqlen = tokens_of(seqlen)
        cached = whole("cached", cached, most=seqlen)
        new = seqlen - cached
        return cls(new, seqlen, make_slices([(0, new, 0, seqlen, None, cached)]))

    @classmethod
    def sliding_window(cls, seqlen: int, window: int) -> AttnMask:
        """Query ``i`` sees its last ``window`` keys, itself included: ``[i - window + 1, i]``."""
        seqlen, window = tokens_of(seqlen), size("window", window, least=1)
        return _of(seqlen, [(0, seqlen, 0, seqlen, 1 - window, 0)])

    @classmethod
    def prefix_lm(cls, seqlen: int, prefix: int) -> AttnMask:
        """The first ``prefix`` tokens see each other; later ones are causal."""
        seqlen = tokens_of(seqlen)
        p = min(size("prefix", prefix), seqlen)
        return _of(seqlen, [(0, p, 0, p, None, None), (p, seqlen, 0, seqlen, None, 0)])

    @classmethod
    def streaming(cls, seqlen: int, sink: int = 64, window: int = 4096) -> AttnMask:
        """Lambda mask (StreamingLLM): the first ``sink`` tokens and the last ``window``.

        Query ``i`` sees ``[0, sink) ∪ [i - window + 1, i]``, causally.
        """
        seqlen, window = tokens_of(seqlen), size("window", window, least=1)
        sink = min(size("sink", sink), seqlen)
        return _of(
            seqlen, [(0, seqlen, 0, seqlen, 1 - window, 0), (0, seqlen, 0, sink, None, -window)]
        )

    @classmethod
    def causal_blockwise(cls, seqlen: int, block: int = 256, local_blocks: int = 2) -> AttnMask:
        """In-context learning mask: sink block, sliding local blocks, dense last block.

        With blocks of ``block`` tokens: the first block is causal; the last block sees all before
        it; a query ``i`` between sees the first block and ``[i - local_blocks * block, i]``. The
        window slides by the token (the paper's figure aligns it to blocks, its code does not).
        """
        seqlen, block = tokens_of(seqlen), size("block", block, least=1)
        local_blocks = size("local_blocks", local_blocks)
        first = min(block, seqlen)
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

        :meth:`shared_prompt` of ``int(seqlen * question_fraction)`` tokens, with answers of equal
        shares of the rest; the last answer takes the remainder.
        """
        seqlen, num_answers = tokens_of(seqlen), whole("num_answers", num_answers, least=1)
        fraction = number("question_fraction", question_fraction)
        if fraction > 1:
            raise ValueError(f"question_fraction must be 1 or less, got {question_fraction}")
        question = int(seqlen * fraction)
        share, rest = divmod(seqlen - question, num_answers)
        if not share:  # all but the last answer are empty
            return cls.shared_prompt(question, [rest])
        not_too_many("answers", num_answers, MOST_SLICES, "plan them as several sequences")
        answers = np.full(num_answers, share)
        answers[-1] += rest
        return cls.shared_prompt(question, answers)

    @classmethod
    def shared_prompt(cls, prompt: int, answers: Sequence[int] | np.ndarray) -> AttnMask:
        """A prompt and several answers to it, by their lengths in tokens (DPO, RL).

        Answers see the prompt and themselves but not each other; each is a segment whose positions
        go on from the prompt's. The last token of the prompt would have to predict the first one of
        every answer, and so predicts nothing, unless only one answer has tokens.
        """
        start, end = packed_runs("answers", answers, before=size("prompt", prompt))
        prompt, seqlen = int(prompt), int(end[-1]) if len(end) else int(prompt)
        rows = [(0, prompt, 0, prompt, None, 0), (prompt, seqlen, 0, prompt, None, None)]
        segments = [(0, 0)] * (prompt > 0) + [(first, prompt) for first in start.tolist()]
        bands = np.concatenate([make_slices(rows), triangles(start, end)])
        return cls(seqlen, seqlen, bands, segments if len(start) > 1 else None)

    @classmethod
    def documents(cls, lengths: Sequence[int] | np.ndarray) -> AttnMask:
        """Documents packed one after another, causal inside each; each is a segment of its own."""
        start, end = packed_runs("document lengths", lengths)
        total = int(end[-1]) if len(end) else 0
        segments = np.stack([start, 0 * start], axis=1)
        return cls(total, total, triangles(start, end), segments if total else None)

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
        texts = whole_numbers("text_lengths", text_lengths, most=MOST_TOKENS).tolist()
        image_size = whole("image_size", image_size, most=MOST_TOKENS)
        if not isinstance(image_sees_only_itself, (bool, np.bool_)):
            raise ValueError(
                f"image_sees_only_itself must be True or False, got {shown(image_sees_only_itself)}"
            )
        slices: list[SliceRow] = []
        start = 0
        for index, length in enumerate(texts):
            if index:
                end = start + image_size
                slices.append((start, end, start if image_sees_only_itself else 0, end, None, None))
                start = end
            slices.append((start, start + length, 0, start + length, None, 0))
            start += length
        return _of(tokens_of(start, "the tokens of texts and images"), slices)

    @classmethod
    def from_slices(
        cls,
        q_len: int,
        k_len: int,
        slices: Iterable[tuple[int, int, int, int, str]],
        *,
        segments: Segments = None,
    ) -> AttnMask:
        """Mask of disjoint ``(q0, q1, k0, k1, kind)`` slices; out of range or overlapping raise."""
        q_len, k_len = tokens_of(q_len, "q_len"), tokens_of(k_len, "k_len")
        mask = cls(q_len, k_len, slices_of_kinds(q_len, k_len, slices), segments)
        check_disjoint(mask.bands)
        return mask

    @classmethod
    def from_ranges(
        cls, ranges: Any, k_len: int | None = None, *, segments: Segments = None
    ) -> AttnMask:
        """Mask of ``[q_len, R, 2]`` half-open key ranges per query, any R; ranges mean their union.

        ``ranges`` is an integer array or tensor (``[q_len, 2]`` counts as R = 1); empty ranges are
        those with end <= start. ``k_len`` defaults to ``q_len``.
        """
        start, end = read_ranges(ranges)
        q_len = len(start)
        k_len = q_len if k_len is None else tokens_of(k_len, "k_len")
        live = end > start
        if bad := first_true((live & ((start < 0) | (end > k_len))).any(axis=1)):
            raise ValueError(f"query {bad[0]} has a key range outside [0, {k_len})")
        return cls(q_len, k_len, ranges_to_slices(*merge_ranges(start, end)), segments)

    @classmethod
    def from_mask_mod(
        cls,
        fn: Callable[..., Any],
        q_len: int,
        k_len: int,
        *,
        head: int | None = None,
        batch: int | None = None,
        num_heads: int | None = None,
        segments: Segments = None,
    ) -> AttnMask:
        """Mask of a FlexAttention ``mask_mod``: ``fn(b, h, q, kv) -> bool``.

        Every pair is evaluated, a band of rows at a time: time grows with ``q_len * k_len``, so
        prefer a named constructor for very long sequences. ``fn`` gets index tensors when torch is
        installed, else numpy arrays. It must return booleans, or integers 0 and 1.

        Args:
            head, batch: take the mask of this one. By default all are compared, and ``ValueError``
                names two that differ: those of several heads are planned as named masks.
            num_heads: how many heads to compare; by default as many as ``fn`` takes, up to 128, of
                batches always.
        """
        q_len, k_len = tokens_of(q_len, "q_len"), tokens_of(k_len, "k_len")
        ranges = ranges_of(fn, q_len, k_len, head=head, batch=batch, num_heads=num_heads)
        return cls(q_len, k_len, ranges_to_slices(ranges[..., 0], ranges[..., 1]), segments)

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
        not_too_many("pairs", self.q_len * self.k_len, MOST_CELLS, "use mask.slices or mask.draw()")
        dense = np.zeros((self.q_len, self.k_len), dtype=bool)
        for q0, q1, k0, k1, lo, hi in self.bands.tolist():
            diagonal = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
            dense[q0:q1, k0:k1] |= (lo <= diagonal) & (diagonal <= hi)
        return dense

    def draw(self, width: int = 64) -> str:
        """A picture in characters: █ all pairs of the cell count, ░ some do, · none.

        ``width``: its columns, 1 to 1024.
        """
        width = whole("width", width, least=1, most=1024)
        return picture(self.bands, self.q_len, self.k_len, width)

    def _repr_html_(self) -> str:
        from dcp.pictures.mask import mask_html

        segments = len(self.segments)
        return mask_html(self.bands, self.q_len, self.k_len, num_segments=segments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, int, bytes, bytes]:
        order = np.lexsort(self.bands.T[::-1])
        return self.q_len, self.k_len, self.bands[order].tobytes(), self.segments.tobytes()

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
    one_of("mask", name, NAMED_MASKS)
    if twice := sorted(given.keys() & parameters.keys()):
        raise ValueError(f"mask {name!r}: {twice[0]} is given twice, in the name and beside it")
    make = NAMED_MASKS[name]
    try:
        inspect.signature(make).bind(seqlen, **given, **parameters)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(make).parameters)[1:]) or "no parameters"
        raise ValueError(f"mask {name!r}: {error}; it takes {takes}") from None
    return make(seqlen, **given, **parameters)


def _of(seqlen: int, rows: Sequence[SliceRow]) -> AttnMask:
    bands = restrict_slices(make_slices(rows), 0, seqlen, 0, seqlen)
    return AttnMask(seqlen, seqlen, bands)
