"""What a planning rank makes of a batch's samples: masks, counts, and a request for its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.cost import sequence_seconds
from dcp.data.batching import DOCUMENT, START, STOP, PlacedBatch
from dcp.data.datasets import SampleDataset, Samples
from dcp.data.exchange import Share
from dcp.data.messages import request_to_bytes
from dcp.data.samples import IGNORED, KINDS, Kinds, Sample
from dcp.data.segments import agreed_segments, piece_labels


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


def contents_of(
    dataset: SampleDataset, batch: SequenceBatch, pieces: np.ndarray, lengths: np.ndarray
) -> Contents:
    """The contents of a batch of (document, start, stop) ``[n, 3]``, of documents of ``lengths``.

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
            if len(sample.tokens) != lengths[index]:
                raise ValueError(
                    f"document {document} has {len(sample.tokens)} tokens, the dataset's lengths "
                    f"say {lengths[index]}: padding (attention_mask 0) does not count"
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


@dataclass(frozen=True)
class Preparation:
    """Turns a batch's place in the data into what is asked of the planner.

    Args:
        dataset: the samples.
        mask_fn, mask_weights: see :class:`dcp.data.DCPDataLoader`.
        spec, cluster, plan_options: of :func:`dcp.plan`.
    """

    dataset: SampleDataset
    mask_fn: Any
    mask_weights: Mapping[str, float] | None
    spec: AttentionSpec
    cluster: Cluster
    plan_options: Mapping[str, Any]

    def sequence_batch(self, pieces: np.ndarray) -> SequenceBatch:
        """The sequences of (document, start, stop) ``[n, 3]``, with their masks."""
        seqlens = (pieces[:, STOP] - pieces[:, START]).tolist()
        masks = self.mask_fn
        if callable(masks):
            masks = masks(seqlens, Samples(self.dataset, pieces))
        return SequenceBatch(seqlens, masks, weights=self.mask_weights)

    def seconds(self, pieces: np.ndarray) -> np.ndarray:
        """What a layer takes for each of (document, start, stop) ``[n, 3]`` on one device alone."""
        width = self.plan_options.get("model_width")
        batch = self.sequence_batch(pieces)
        return sequence_seconds(batch, self.spec, self.cluster, model_width=width)

    def prepare(self, place: PlacedBatch, cluster: Cluster, **options: Any) -> tuple[Share, bytes]:
        """A batch's share, without plan, and the request for its plan on ``cluster``, with more
        ``options`` of :func:`dcp.plan`."""
        if place.error is not None:
            raise place.error
        pieces = place.pieces
        batch, lengths = self.sequence_batch(pieces), self.dataset.lengths_of(pieces[:, DOCUMENT])
        known = contents_of(self.dataset, batch, pieces, lengths)
        share = Share(
            pieces=np.column_stack([pieces, lengths]),  # for the readers to check theirs against
            num_loss_tokens=known.num_loss_tokens,
            last=place.last,
            num_batches=place.num_batches,
            plan=b"",
            checksum=self.dataset.checksum_of(pieces),
            segments=known.segments,
            fields=known.fields,
        )
        request = request_to_bytes(batch, self.spec, cluster, {**self.plan_options, **options})
        return share, request
