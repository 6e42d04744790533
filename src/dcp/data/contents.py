"""What a planning rank tells of a batch beside its plan: labels, segments, the kinds of fields."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dcp.batch import SequenceBatch
from dcp.data.datasets import SampleDataset
from dcp.data.samples import IGNORED, KINDS, Sample
from dcp.data.segments import agreed_segments, piece_labels

Kinds = dict[str, tuple[str, tuple[int, ...]]]  # dtype, and shape of one token's value


@dataclass(frozen=True)
class Contents:
    """What all ranks must know of a batch's samples.

    Attributes:
        num_loss_tokens: labels that count.
        segments: (sequence, first token, its position) of the segments of every sequence that has
            several: int64 ``[n, 3]``.
        fields: the kind of each field.
    """

    num_loss_tokens: int
    segments: np.ndarray
    fields: Kinds


def contents_of(dataset: SampleDataset, batch: SequenceBatch, pieces: np.ndarray) -> Contents:
    """The contents of a batch of (document, start, stop) ``[n, 3]``.

    Reads the samples, but where the dataset itself counts labels, there are no fields, and the mask
    has one segment. Raises ``ValueError`` where sample, masks and lengths do not agree.
    """
    num_loss_tokens, found = 0, [np.zeros((0, 3), dtype=np.int64)]
    fields: Kinds = {}
    for index, piece in enumerate(pieces.tolist()):
        document, start, stop = piece
        masks = {name: of[index] for name, of in batch.masks.items()}
        segments = agreed_segments(masks, None, document)
        known = None if dataset.fields else dataset.known_loss_tokens(*piece)
        if known is None or len(segments) > 1:
            sample = dataset.sample(document)
            if len(sample.tokens) != dataset.lengths[document]:
                raise ValueError(
                    f"document {document} has {len(sample.tokens)} tokens, the dataset's lengths "
                    f"say {dataset.lengths[document]}: padding (attention_mask 0) does not count"
                )
            if sample.positions is not None:
                segments = agreed_segments(masks, sample.positions[start:stop], document)
            known = int((piece_labels(sample, start, stop, segments) != IGNORED).sum())
            _merge_kinds(fields, sample, document)
        num_loss_tokens += known
        if len(segments) > 1:
            found.append(np.insert(segments, 0, index, axis=1))
    for name in dataset.fields:
        fields.setdefault(name, (KINDS[-1], ()))  # all samples are empty
    return Contents(num_loss_tokens, np.concatenate(found), fields)


def _merge_kinds(fields: Kinds, sample: Sample, document: int) -> None:
    """The kinds of a batch's fields, with those of one more sample."""
    for name, values in sample.fields.items():
        if not len(values):
            continue
        dtype, shape = fields.get(name, (KINDS[0], values.shape[1:]))
        if values.shape[1:] != shape:
            raise ValueError(
                f"field {name!r} of document {document} has the shape {values.shape[1:]} per "
                f"token, that of others {shape}: give all the same"
            )
        fields[name] = (max(dtype, values.dtype.name, key=KINDS.index), shape)
