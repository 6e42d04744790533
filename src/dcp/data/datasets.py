"""Index-style token datasets: lengths known up front, documents read when they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any
from zlib import crc32

import numpy as np

from dcp.data.sources import Documents
from dcp.data.tokenizers import ByteTokenizer, Tokenizer

NUM_SAMPLED = 8  # documents that ranks compare
IGNORED = -100  # a label that does not count, as torch's cross-entropy has it


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
    """Any sequence of samples: token arrays, or mappings with ``input_ids`` and maybe ``labels``.

    One thread at a time reads from it. ``lengths`` and ``num_loss_tokens`` are those of the
    sequence, where it has them; else they read the samples.
    """

    def __init__(self, samples: Any) -> None:
        self._samples, self._lock = samples, Lock()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        with self._lock:
            return self._samples[index]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample: int64 ``[n]``."""
        if (known := getattr(self._samples, "lengths", None)) is not None:
            return np.asarray(known, dtype=np.int64)
        return np.array([len(tokens_of(self[i])) for i in range(len(self))], dtype=np.int64)

    def num_loss_tokens(self, index: int, start: int, stop: int) -> int:
        """Tokens of a sample's piece whose shifted label counts."""
        if hasattr(self._samples, "num_loss_tokens"):
            with self._lock:
                return self._samples.num_loss_tokens(index, start, stop)
        return int((shifted_labels(self[index])[start:stop] != IGNORED).sum())


def as_dataset(dataset: Any) -> SampleDataset:
    """The dataset's samples; ``ValueError`` where it has none."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"dataset of type {type(dataset).__name__} has no length or no index")
    if not len(dataset):
        raise ValueError("the dataset is empty: it has no documents")
    return SampleDataset(dataset)


def tokens_of(sample: Any) -> np.ndarray:
    """The tokens of a sample: int64 ``[length]``."""
    if isinstance(sample, Mapping):
        if "input_ids" not in sample:
            raise ValueError(f"a sample has no 'input_ids', it has {', '.join(map(str, sample))}")
        sample = sample["input_ids"]
    tokens = np.asarray(sample)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(
            f"a sample must be a vector of integers, got {tokens.dtype} of shape {tokens.shape}"
        )
    return tokens.astype(np.int64)


def shifted_labels(sample: Any) -> np.ndarray:
    """The label of each token: the next token's, -100 at the end. int64 ``[length]``.

    A sample's own ``labels`` stand beside their tokens (-100: does not count); without them the
    tokens are their own labels.
    """
    tokens = tokens_of(sample)
    own = tokens
    if isinstance(sample, Mapping) and sample.get("labels") is not None:
        own = np.asarray(sample["labels"], dtype=np.int64)
        if own.shape != tokens.shape:
            raise ValueError(f"a sample has {len(tokens)} tokens but labels of shape {own.shape}")
    labels = np.full_like(tokens, IGNORED)
    labels[:-1] = own[1:]
    return labels


class Samples(Sequence[Any]):
    """The samples of a batch, each read when it is indexed; split documents as their pieces."""

    def __init__(self, dataset: Any, pieces: np.ndarray) -> None:
        self._dataset, self._pieces = dataset, pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        document, start, stop = self._pieces[index].tolist()
        sample = self._dataset[document]
        if stop - start == len(tokens_of(sample)):
            return sample
        return tokens_of(sample)[start:stop]


def sampled_documents(dataset: Any) -> dict[str, str | None]:
    """What is in a few documents, the same ones for the same length: a line on each.

    Always ``NUM_SAMPLED`` lines. None where there is no such document, or it cannot be read, which
    comes to light in its turn.
    """
    count = min(len(dataset), NUM_SAMPLED)
    chosen = np.random.default_rng(0).choice(len(dataset), count, replace=False).tolist()
    found: dict[str, str | None] = {}
    for index in chosen:
        try:
            found[f"document {index}"] = _summary(dataset[index])
        except Exception:
            found[f"document {index}"] = None
    return found | {f"no document {n}": None for n in range(NUM_SAMPLED - count)}


def _summary(sample: Any) -> str:
    """Tokens, and a checksum of all numbers and texts of a sample."""
    tokens = tokens_of(sample)
    crc = crc32(tokens.tobytes())
    if isinstance(sample, Mapping):
        for name in sorted(set(sample) - {"input_ids"}, key=str):
            value = np.asarray(sample[name])
            if value.dtype.kind in "biufU":
                crc = crc32(f"{name}{value.shape}".encode() + value.tobytes(), crc)
    return f"{len(tokens)} tokens, checksum {crc:08x}"
