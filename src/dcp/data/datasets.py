"""Index-style token datasets: lengths known up front, documents read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from inspect import getattr_static
from threading import Lock
from typing import Any

import numpy as np

from dcp.data.batching import checked_lengths
from dcp.data.groups import group_numbers
from dcp.data.samples import Sample, SampleFormat
from dcp.data.sources import Documents
from dcp.data.tokenizers import ByteTokenizer, Tokenizer


class TokenDataset:
    """Documents as tokens. ``dataset[i]`` is int64 ``[lengths[i]]``.

    With a byte tokenizer the lengths come from the file sizes; any other tokenizer encodes every
    document once, when the lengths are first asked for.
    """

    def __init__(self, documents: Documents, tokenizer: Tokenizer | None = None) -> None:
        self.documents, self.tokenizer = documents, tokenizer or ByteTokenizer()

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokenizer.encode(self.documents.read(index))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 ``[n]``."""
        lengths = self.tokenizer.length_of(self.documents.num_bytes)
        if lengths is None:
            lengths = np.array([len(self[index]) for index in range(len(self))], dtype=np.int64)
        return lengths

    def num_loss_tokens(self, index: int, start: int, stop: int) -> int:
        """Tokens of a document's piece that have a label: all but the document's last."""
        return max(min(stop, int(self.lengths[index]) - 1) - start, 0)


class SampleDataset:
    """Any sequence of samples, each read by one :class:`SampleFormat`.

    One thread at a time reads from it. ``lengths``, ``group_ids`` and ``num_loss_tokens`` are those
    of the sequence, where it has them; else they are found in the samples.
    """

    def __init__(self, samples: Any, form: SampleFormat, *, group_ids: Any = None) -> None:
        self._samples, self._form, self._lock = samples, form, Lock()
        self._group_ids = getattr(samples, "group_ids", None) if group_ids is None else group_ids
        self._has_lengths = getattr_static(samples, "lengths", None) is not None  # not read yet

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def is_stream(self) -> bool:
        """Whether only the documents that have just been read can be asked for."""
        return not hasattr(self._samples, "__len__")

    def __getitem__(self, index: int) -> Any:
        """A sample as the sequence has it."""
        with self._lock:
            return self._samples[index]

    @property
    def fields(self) -> Sequence[str]:
        """Further fields that every sample has."""
        return self._form.fields

    def sample(self, index: int) -> Sample:
        """A sample as the loader understands it; ``ValueError`` where it does not."""
        sample = self._form.read(self[index], index)
        given = self._has_lengths or self._group_ids is not None
        if sample.group is not None and given:
            raise ValueError(
                f"document {index} has a group_id, but the dataset gives its lengths or its "
                f"group_ids by itself, so that samples are not read for it: give group_ids=[…], "
                f"one for each document, and ignore=('group_id',)"
            )
        return sample

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample: int64 ``[n]``."""
        return self._found[0]

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of some samples; a stream knows those of its window alone."""
        known = getattr(self._samples, "lengths_of", None)
        return self.lengths[documents] if known is None else known(documents)

    def checksum_of(self, pieces: np.ndarray) -> int:
        """Of the documents that a stream's batch was chosen from; 0 where there is an index."""
        known = getattr(self._samples, "checksum_of", None)
        return 0 if known is None else int(known(pieces))

    @property
    def groups(self) -> np.ndarray | None:
        """The number of each sample's group (:func:`group_numbers`); None if it has none."""
        return self._found[1]

    def known_loss_tokens(self, index: int, start: int, stop: int) -> int | None:
        """Labels that count in a sample's piece, where the sequence says so by itself."""
        if not hasattr(self._samples, "num_loss_tokens"):
            return None
        with self._lock:
            return int(self._samples.num_loss_tokens(index, start, stop))

    @cached_property
    def _found(self) -> tuple[np.ndarray, np.ndarray | None]:
        lengths, groups = getattr(self._samples, "lengths", None), self._group_ids
        if lengths is None:
            lengths, own = [], []
            for index in range(len(self)):
                sample = self.sample(index)
                lengths.append(len(sample.tokens))
                own.append(sample.group)
            if groups is None and any(group is not None for group in own):
                groups = own
        numbers = None if groups is None else group_numbers(groups, len(self))
        return checked_lengths(lengths, len(self)), numbers


def as_dataset(
    dataset: Any, form: SampleFormat | None = None, *, group_ids: Any = None
) -> SampleDataset:
    """The dataset's samples; ``ValueError`` where it has none."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"dataset of type {type(dataset).__name__} has no length or no index")
    if not len(dataset):
        raise ValueError("the dataset is empty: it has no documents")
    return SampleDataset(dataset, form or SampleFormat(), group_ids=group_ids)


class Samples(Sequence[Any]):
    """The samples of a batch, each read when it is indexed; split documents as their pieces."""

    def __init__(self, dataset: SampleDataset, pieces: np.ndarray) -> None:
        self._dataset, self._pieces = dataset, pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        document, start, stop = self._pieces[index].tolist()
        if stop - start == self._dataset.lengths_of(np.array([document]))[0]:
            return self._dataset[document]
        return self._dataset.sample(document).tokens[start:stop]
