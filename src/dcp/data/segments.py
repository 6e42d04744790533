"""Segments: runs of a sequence whose positions begin anew, as its masks and its sample say.

A segment is (first token, position of that token). Positions count up inside it, and its last
token predicts nothing: what follows in the sequence is not its continuation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dcp.data.samples import IGNORED, Sample, segment_begins
from dcp.masks import AttnMask
from dcp.ragged import runs
from dcp.slices import restrict_slices, slice_area

ONE = np.zeros((1, 2), dtype=np.int64)  # the whole sequence, from position 0


def segments_of(mask: AttnMask) -> np.ndarray:
    """The segments that a mask knows: int64 ``[n, 2]``."""
    segments = getattr(mask, "segments", None)
    return ONE if segments is None or not len(segments) else np.asarray(segments, dtype=np.int64)


def segment_positions(segments: np.ndarray, length: int) -> np.ndarray:
    """The position of each of a sequence's tokens: int64 ``[length]``."""
    first, position = segments.T
    return runs(position, np.diff(first, append=length))


def piece_labels(sample: Sample, start: int, stop: int, segments: np.ndarray) -> np.ndarray:
    """The labels of a document's piece: int64 ``[stop - start]``.

    The last token of a piece predicts the next one of its document, unless the piece has segments
    of its mask's: then nobody knows whether the document's next token continues the last of them.
    """
    labels = sample.labels[start:stop].copy()
    if len(segments) > 1 and not sample.labels_are_final:
        labels[segments[1:, 0] - 1] = IGNORED
        if sample.positions is None:
            labels[-1:] = IGNORED
    return labels


def piece_positions(
    sample: Sample, start: int, stop: int, segments: np.ndarray, document: int
) -> np.ndarray:
    """The positions of a document's piece, its own or those of its segments: ``[stop - start]``.

    Raises ``ValueError`` where its own begin anew and no segment does.
    """
    if sample.positions is None:
        return segment_positions(segments, stop - start)
    own = sample.positions[start:stop]
    unknown = np.setdiff1d(segment_begins(own), segments[:, 0])
    if len(unknown):
        raise ValueError(
            f"position_ids of document {document} begin anew at token {unknown[0]}, where no "
            f"segment was planned: a dataset with num_loss_tokens must give them in its mask, such "
            f"as AttnMask.documents, or leave num_loss_tokens out"
        )
    return own


def agreed_segments(
    masks: Mapping[str, AttnMask], positions: np.ndarray | None, document: int
) -> np.ndarray:
    """The segments of a sequence by all its named masks and its own positions: int64 ``[n, 2]``.

    A mask of one segment may be one that does not know its segments: it agrees with those of
    another, or of the positions, if it keeps them apart.

    Raises ``ValueError`` where they disagree.
    """
    known = {name: segments_of(mask) for name, mask in masks.items()}
    known = {name: segments for name, segments in known.items() if len(segments) > 1}
    (first, segments), *others = known.items() or [("", ONE)]
    for name, other in others:
        if not np.array_equal(segments, other):
            raise ValueError(
                f"masks {first!r} and {name!r} of document {document} have other segments "
                f"({_shown(segments)} and {_shown(other)}): positions can follow only one of them"
            )
    if positions is not None:
        segments = _of_positions(segments, positions, document)
    for name, mask in masks.items():
        if name not in known and len(segments) > 1:
            _check_apart(mask, name, segments, document)
    return segments


def _of_positions(segments: np.ndarray, positions: np.ndarray, document: int) -> np.ndarray:
    """The segments of a sample's own positions, which must agree with those of its mask."""
    if len(segments) == 1:
        first = np.append(0, segment_begins(positions))[: len(positions)]
        return np.column_stack([first, positions[first]])
    shift = positions - segment_positions(segments, len(positions))
    if not segments[1:, 1].any():  # then the first one may go on from a place of its own
        shift[: segments[1, 0]] -= shift[0]
    if (wrong := shift != shift[0]).any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"position_ids of document {document} put token {at} at {positions[at]}, its mask "
            f"has segments (first token, position) {_shown(segments)}: let them agree, or leave "
            f"position_ids out"
        )
    return segments


def _check_apart(mask: AttnMask, name: str, segments: np.ndarray, document: int) -> None:
    """No token may see one of an earlier segment whose position is not before its own segment."""
    stops = np.append(segments[1:, 0], mask.q_len)
    for number, (first, position) in enumerate(segments.tolist()[1:], start=1):
        if position:
            earlier = segments[:number]
            behind = np.maximum(position - earlier[:, 1], 0)
            keys = np.column_stack([earlier[:, 0] + behind, stops[:number]])
            keys = keys[keys[:, 0] < keys[:, 1]]
        else:
            keys = np.array([[0, first]])
        bands = np.repeat(mask.bands, len(keys), axis=0)
        k0, k1 = np.tile(keys, (len(mask.bands), 1)).T
        if slice_area(restrict_slices(bands, first, stops[number], k0, k1)).any():
            raise ValueError(
                f"a segment of document {document} begins at token {first} (position {position}), "
                f"but by mask {name!r} its tokens see those before it: return a mask that keeps "
                f"them apart, such as AttnMask.documents({_shown(stops - segments[:, 0])}), or "
                f"leave position_ids out"
            )


def _shown(values: np.ndarray) -> str:
    some = ", ".join(map(str, values[:4].tolist()))
    return f"[{some}{', …' if len(values) > 4 else ''}]"
