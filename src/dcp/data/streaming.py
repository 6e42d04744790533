"""Streams: datasets that can only be iterated, read by every rank a window of documents at a time.

A window is ``stream_window`` documents in a row, the last of an epoch fewer. Batches are made of
the documents of one window, so that a place in a stream is a window and a number of batches taken
from it, and memory holds the windows between the batch in use and the furthest one being planned.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any
from zlib import crc32

import numpy as np
from torch.utils.data import IterableDataset

from dcp.data.batching import DOCUMENT, Deal, PlacedBatch, TokenBudgetBatches, is_whole
from dcp.data.exchange import Share
from dcp.data.samples import SampleFormat

# The place of an epoch's first batch, but for its first document's number.
_BEGINNING = {"document": 0, "window": 0, "taken": 0, "checksum": None, "dataset": None}


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can be iterated, but has no length or no index."""
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    # torch's own class has an index, which raises
    return hasattr(dataset, "__iter__") and (not indexed or isinstance(dataset, IterableDataset))


@dataclass(frozen=True, eq=False)
class Window:
    """Some documents of a stream, in a row.

    Attributes:
        epoch, number: which window of which epoch.
        first: number of its first document; documents are counted through all epochs.
        samples, lengths: the documents, and the tokens of each, int64 ``[n]``.
        checksum: of all their tokens.
        state: the dataset's own state where the window begins, or None.
        last: the epoch ends with it.
    """

    epoch: int
    number: int
    first: int
    samples: list[Any]
    lengths: np.ndarray
    checksum: int
    state: Any
    last: bool

    @property
    def end(self) -> int:
        return self.first + len(self.samples)


class DocumentStream:
    """The windows of a stream that are in memory; reads on when a later document is asked for.

    Every rank iterates the stream by itself; all must get the same documents in the same order.

    Args:
        dataset: is iterated once an epoch, after ``set_epoch(epoch)`` where it has that.
        form: how its samples are read.
        order: keywords of :class:`TokenBudgetBatches`, which makes the batches of each window;
            the seed shuffles a window's documents.
        window: documents of a window.
        read_ahead: read the next window in a thread while the last one is used.
        rank: of this process, for messages.

    Attributes:
        place: where the next batch stands, JSON-able, equal on all ranks.
    """

    def __init__(
        self,
        dataset: Any,
        form: SampleFormat,
        order: Mapping[str, Any],
        *,
        window: int,
        read_ahead: bool,
        rank: int,
    ) -> None:
        if not is_whole(window) or window < 1:
            raise ValueError(f"stream_window must be 1 document or more, got {window!r}")
        TokenBudgetBatches(np.zeros(1, dtype=np.int64), **order)  # checks the options
        self._dataset, self._form, self._order, self._size = dataset, form, dict(order), window
        self._read_ahead, self._rank = read_ahead, rank
        self._stateful = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        self._pristine = deepcopy(dataset.state_dict()) if self._stateful else None
        self._lock, self._moved = threading.Lock(), False
        self._begun: Future[Window] | None = None

    def start(self, epoch: int, place: Mapping[str, Any] | None = None) -> None:
        """Go to a ``place``, or to the beginning; ``ValueError`` where it is not there any more."""
        place = dict(_BEGINNING if place is None else place)
        counts: list[Any] = [place.get(name) for name in ("document", "window", "taken")]
        if place.keys() != _BEGINNING.keys() or not all(is_whole(n) and n >= 0 for n in counts):
            raise ValueError(f"cannot resume: {place} is no place in a stream")
        with self._lock:
            if self._begun is not None:
                self._begun.exception()  # the thread has read its window
            self.place, self._begun = place, None
            self._failure: Exception | None = None
            self._windows: list[Window] = []
            self._source = self._read(epoch, place)
        self._window = window = self.window_of(place["document"])
        if place["checksum"] not in (None, window.checksum):
            how = "its own state_dict" if place["dataset"] is not None else "reading it again"
            raise ValueError(
                f"cannot resume: by {how} the stream gives other documents than before, from "
                f"document {window.first} on; it must give the same in the same order"
            )

    def batches(self, epoch: int, position: int, deal: Deal | None = None) -> Iterator[PlacedBatch]:
        """Batches from :attr:`place` on, without end; one with an ``error`` where reading fails.

        ``deal`` makes other batches of a window's.
        """
        taken, document = self.place["taken"], self.place["document"]
        held: PlacedBatch | None = None  # not known to be the last of its epoch, or not
        try:
            while True:
                window = self.window_of(document)
                made = TokenBudgetBatches(window.lengths, first=window.first, **self._order)
                batches: Sequence[np.ndarray] = list(made.epoch(window.epoch, window.number))
                if deal is not None:
                    batches = deal(batches)
                if taken > len(batches):
                    raise ValueError(
                        f"cannot resume behind batch {taken} of {len(batches)} that documents "
                        f"{window.first} to {window.end - 1} make"
                    )
                for pieces in islice(batches, taken, None):
                    if held is not None:
                        yield held
                    held = PlacedBatch(window.epoch, position, pieces, False, 0)
                    position += 1
                taken, document = 0, window.end
                if window.last:
                    if held is None:
                        raise ValueError(
                            f"no batch of epoch {window.epoch} is full enough: lower "
                            f"tokens_per_batch or use packing='first_fit'"
                        )
                    yield replace(held, last=True)
                    held, position = None, 0
        except Exception as error:  # on every rank in its turn
            if held is not None:
                yield held
            nothing = np.zeros((0, 3), dtype=np.int64)
            while True:
                yield PlacedBatch(epoch, position, nothing, False, 0, error)

    def window_of(self, document: int) -> Window:
        """The window of a document that is not yet forgotten; reads up to it."""
        while True:
            for window in tuple(self._windows):
                if window.first <= document < window.end:
                    return window
            with self._lock:
                if not self._windows or document >= self._windows[-1].end:
                    self._windows.append(self._next())
                elif document < self._windows[0].first:
                    raise ValueError(f"document {document} of the stream has gone by")

    def __getitem__(self, document: int) -> Any:
        window = self.window_of(document)
        return window.samples[document - window.first]

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of documents of one window: int64 ``[n]``."""
        window = self.window_of(int(documents[0]))
        return window.lengths[documents - window.first]

    def checksum_of(self, pieces: np.ndarray) -> int:
        """The checksum of the window that a batch is made of."""
        return self.window_of(int(pieces[0, DOCUMENT])).checksum

    def advance(self, share: Share) -> None:
        """A batch is taken: move :attr:`place` behind it, and forget the windows before it.

        ``ValueError`` where the rank that planned the batch has read other documents.
        """
        window = self.window_of(int(share.pieces[0, DOCUMENT]))
        if window.checksum != share.checksum:
            raise ValueError(
                f"rank {self._rank} reads another stream than the rank that planned the batch: "
                f"documents {window.first} to {window.end - 1} differ; every rank must iterate "
                f"all of the same documents in the same order, not a part of its own"
            )
        del self._windows[: self._windows.index(window)]
        taken = self.place["taken"] + 1 if window is self._window else 1
        self._window = window
        self.place = {
            "document": window.first,
            "window": window.number,
            "taken": taken,
            "checksum": window.checksum,
            "dataset": window.state,
        }
        if share.last:
            while not window.last:  # packing may leave the last windows out
                window = self.window_of(window.end)
            self.place = _BEGINNING | {"document": window.end}

    # ------------------------------------------------------------------ reading

    def _next(self) -> Window:
        if self._failure is not None:
            raise self._failure
        try:
            window = next(self._source) if self._begun is None else self._begun.result()
        except Exception as error:
            self._failure = error
            raise
        if self._read_ahead:
            self._begun = Future()
            arguments = (self._begun, self._source)
            threading.Thread(target=_read_into, args=arguments, daemon=True).start()
        return window

    def _read(self, epoch: int, place: Mapping[str, Any]) -> Iterator[Window]:
        """Windows from a place on, epoch after epoch."""
        number, first, state = place["window"], place["document"], place["dataset"]
        while True:
            documents = self._iterate(epoch, number * self._size, state)
            ahead = list(islice(documents, 1))
            if not ahead:
                raise ValueError(f"the stream is empty: epoch {epoch} has no document {first}")
            while ahead:
                samples, lengths, checksum = self._gather(chain(ahead, documents), first)
                after = self._own_state()
                failure: Exception | None = None
                try:
                    ahead = list(islice(documents, 1))
                except Exception as error:  # of the next window; this one is whole
                    failure = error
                yield Window(epoch, number, first, samples, lengths, checksum, state, not ahead)
                if failure is not None:
                    raise failure
                number, first, state = number + 1, first + len(samples), after
            epoch, number, state = epoch + 1, 0, None

    def _iterate(self, epoch: int, skip: int, state: Any) -> Iterator[Any]:
        """An epoch's documents: those behind the dataset's own ``state``, or all but ``skip``."""
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        if self._stateful and state is not None:
            self._dataset.load_state_dict(state)
            skip = 0
        elif self._stateful and self._moved:
            self._dataset.load_state_dict(deepcopy(self._pristine))
        documents = iter(self._dataset)
        if documents is self._dataset and self._moved and not self._stateful:
            raise ValueError(
                f"the stream, a {type(documents).__name__}, can be read only once: give the loader "
                f"an object whose __iter__ begins anew"
            )
        self._moved = True
        skipped = sum(1 for _ in islice(documents, skip))
        if skipped < skip:
            raise ValueError(
                f"cannot resume: epoch {epoch} of the stream has {skipped} documents, "
                f"and {skip} were used before"
            )
        return documents

    def _gather(self, documents: Iterator[Any], first: int) -> tuple[list[Any], np.ndarray, int]:
        """The samples of a window, the tokens of each, and their checksum."""
        samples: list[Any] = []
        lengths, checksums = [], []
        for raw in islice(documents, self._size):
            sample = self._form.read(raw, first + len(samples))
            if sample.group is not None:
                raise ValueError(
                    f"document {first + len(samples)} of the stream has a group_id: documents are "
                    f"kept together in datasets with an index only; or give ignore=('group_id',)"
                )
            samples.append(raw)
            lengths.append(len(sample.tokens))
            checksums.append(crc32(sample.tokens.data))
        if crc32(self._form.read(samples[0], first).tokens.data) != checksums[0]:
            raise ValueError(
                f"document {first} of the stream has changed since it was given: yield a copy"
            )
        return samples, np.array(lengths), crc32(np.array(checksums).data)

    def _own_state(self) -> Any:
        """The dataset's own state, if it has one that JSON can hold."""
        if not self._stateful:
            return None
        state = self._dataset.state_dict()
        try:
            copied = json.loads(json.dumps(state))
        except (TypeError, ValueError):
            return None
        return copied if copied == state else None


def _read_into(future: Future[Window], source: Iterator[Window]) -> None:
    try:
        future.set_result(next(source))
    except BaseException as error:
        future.set_exception(error)
