"""Documents of an optimiser step dealt to its micro-batches, so that all take equally long.

The stages of a pipeline wait for the slowest micro-batch. Packing fills each to the budget of
tokens, and of as many tokens one long document costs many times what short ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dcp.data.batching import START, STOP, Deal, TokenBudgetBatches, is_whole

_ENOUGH = 1e-3  # of the slowest micro-batch: what a further change must bring


def dealing(
    micro_batches: int,
    tokens_per_batch: int,
    seconds: Callable[[np.ndarray], np.ndarray],
    batches: TokenBudgetBatches | None = None,
) -> Deal | None:
    """How an epoch's ``batches`` (None: a stream's) become micro-batches; None where they stay.

    See :class:`Dealer` for the arguments.
    """
    if not is_whole(micro_batches) or micro_batches < 1:
        raise ValueError(f"micro_batches must be a whole number, 1 or more, got {micro_batches!r}")
    if micro_batches == 1:
        return None
    units = None if batches is None else batches.units
    return partial(Steps, dealer=Dealer(micro_batches, tokens_per_batch, seconds, units))


@dataclass(frozen=True)
class Dealer:
    """Turns the batches of an epoch into steps of ``micro_batches`` each, of the same documents.

    Args:
        micro_batches: of a step.
        tokens_per_batch: no micro-batch has more.
        seconds: what each of (document, start, stop) ``[n, 3]`` costs: float ``[n]``.
        units: a number for each, where those of one number stay together; None: each by itself.
    """

    micro_batches: int
    tokens_per_batch: int
    seconds: Callable[[np.ndarray], np.ndarray]
    units: Callable[[np.ndarray], np.ndarray] | None = None

    def deal(self, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The documents of a step's batches, each ``[n, 3]``, as its micro-batches.

        There are always as many. Where the documents are fewer, a micro-batch is one sequence of
        no tokens. Each document stays in the order that it came in.
        """
        pieces = np.concatenate(batches)
        given = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        unit = np.arange(len(pieces)) if self.units is None else self.units(pieces)
        _, first, unit = np.unique(unit, return_index=True, return_inverse=True)
        dealt = deal(
            np.bincount(unit, self.seconds(pieces)),
            np.bincount(unit, pieces[:, STOP] - pieces[:, START]).astype(np.int64),
            given[first],
            count=self.micro_batches,
            tokens_per_batch=self.tokens_per_batch,
        )[unit]
        found = [pieces[dealt == number] for number in range(self.micro_batches)]
        nothing = pieces[:1].copy()
        nothing[:, START] = nothing[:, STOP]
        return [micro_batch if len(micro_batch) else nothing for micro_batch in found]


class Steps(Sequence[np.ndarray]):
    """The micro-batches of an epoch's batches; a step is dealt when its first one is asked for."""

    def __init__(self, batches: Sequence[np.ndarray], dealer: Dealer) -> None:
        self._batches, self._dealer = batches, dealer
        self._step, self._dealt = -1, list[np.ndarray]()

    def __len__(self) -> int:
        count = self._dealer.micro_batches
        return -(-len(self._batches) // count) * count

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, place = divmod(index, self._dealer.micro_batches)
        if step != self._step:
            first = step * self._dealer.micro_batches
            of_step = self._batches[first : first + self._dealer.micro_batches]
            self._step, self._dealt = step, self._dealer.deal(of_step)
        return self._dealt[place]


def deal(
    seconds: np.ndarray,
    tokens: np.ndarray,
    given: np.ndarray,
    *,
    count: int,
    tokens_per_batch: int,
) -> np.ndarray:
    """The micro-batch of each document, int64 ``[n]``, so that the slowest is soon done.

    Longest first: some to the micro-batch with least seconds, the others to that with most room, as
    full micro-batches differ in nothing but their long documents. How many are some is tried out.
    Then, and from ``given`` too, the slowest gives a document for short ones while it gets faster.

    Args:
        seconds, tokens: of each document, ``[n]``.
        given: a deal within the budget, which the result is never worse than.
    """
    deals = [given]
    by_seconds = len(seconds)
    while by_seconds:
        deals.append(_longest_first(seconds, tokens, count, tokens_per_batch, by_seconds))
        by_seconds //= 2
    better = [_exchanged(seconds, tokens, of, count, tokens_per_batch) for of in deals if len(of)]
    return min(better, key=lambda of: np.bincount(of, seconds, count).max())


def _longest_first(
    seconds: np.ndarray, tokens: np.ndarray, count: int, tokens_per_batch: int, by_seconds: int
) -> np.ndarray:
    """Graham's rule for the first ``by_seconds``; empty where a document finds no room."""
    dealt, loads = np.zeros(len(seconds), dtype=np.int64), np.zeros(count)
    rooms = np.full(count, tokens_per_batch)
    for turn, document in enumerate(np.argsort(-seconds, kind="stable").tolist()):
        fitting = np.flatnonzero(rooms >= tokens[document])
        if not len(fitting):
            return dealt[:0]
        weights = loads if turn < by_seconds else -rooms
        chosen = fitting[np.argmin(weights[fitting])]
        dealt[document] = chosen
        loads[chosen] += seconds[document]
        rooms[chosen] -= tokens[document]
    return dealt


def _exchanged(
    seconds: np.ndarray, tokens: np.ndarray, dealt: np.ndarray, count: int, tokens_per_batch: int
) -> np.ndarray:
    """The deal after exchanges that make the slowest micro-batch faster, while there are any."""
    dealt = dealt.copy()
    while True:
        loads = np.bincount(dealt, seconds, count)
        rooms = tokens_per_batch - np.bincount(dealt, tokens, count).astype(np.int64)
        slowest = int(np.argmax(loads))
        wanted = loads[slowest] * (1 - _ENOUGH)
        for give, take, other in _exchanges(seconds, tokens, dealt, slowest, loads, rooms):
            less = seconds[give].sum() - seconds[take].sum()
            if max(loads[slowest] - less, loads[other] + less) <= wanted:
                dealt[give], dealt[take] = other, slowest
                break
        else:
            return dealt


def _exchanges(
    seconds: np.ndarray,
    tokens: np.ndarray,
    dealt: np.ndarray,
    slowest: int,
    loads: np.ndarray,
    rooms: np.ndarray,
) -> Iterator[tuple[int, np.ndarray, int]]:
    """A document that the slowest micro-batch may give, those it may take for it, and the
    micro-batch they come from: with the longest and the fastest first.

    It takes nothing, else the short ones whose tokens fill the place.
    """
    mine = np.flatnonzero(dealt == slowest)
    others = {
        int(other): np.flatnonzero(dealt == other)
        for other in np.argsort(loads, kind="stable")
        if other != slowest
    }
    for give in mine[np.argsort(-seconds[mine], kind="stable")].tolist():
        for other, theirs in others.items():
            theirs = theirs[np.argsort(tokens[theirs], kind="stable")]
            least = max(int(tokens[give] - rooms[other]), 0)
            most = int(tokens[give] + rooms[slowest])
            taken = _filling(tokens[theirs].tolist(), least, most)
            if taken is not None:
                yield give, theirs[taken], other


def _filling(tokens: list[int], least: int, most: int) -> list[int] | None:
    """Which of ``tokens``, the first that do, sum to between ``least`` and ``most``; None: none do.

    Bit ``n`` of a reach says that some sum to ``n`` (subset sum, by dynamic programming).
    """
    reaches, window = [1], (1 << (most + 1)) - (1 << least)
    for size in tokens:
        if reaches[-1] & window:
            break
        reaches.append((reaches[-1] | reaches[-1] << size) & ((1 << (most + 1)) - 1))
    if not (found := reaches[-1] & window):
        return None
    left, taken = found.bit_length() - 1, []
    for index in range(len(reaches) - 2, -1, -1):
        if not reaches[index] >> left & 1:
            taken.append(index)
            left -= tokens[index]
    return taken
