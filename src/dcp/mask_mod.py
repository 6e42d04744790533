"""FlexAttention mask functions, ``fn(b, h, q, kv) -> bool``, evaluated as key ranges per query.

A mask is that of one sequence and of all heads. So a function is compared over heads and batches
and refused where they differ, and what it returns is checked before anything is made of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp.checks import shown, whole
from dcp.slices import dense_to_ranges, first_true

PROBED = 128  # heads, and batches, that are compared where nothing says how many there are
_PAIRS = 1 << 22  # that are evaluated at a time
Of = tuple[list[int], list[int]]  # batches and heads, one of each for every evaluation


def ranges_of(
    fn: Callable[..., Any],
    q_len: int,
    k_len: int,
    *,
    head: int | None,
    batch: int | None,
    num_heads: int | None,
) -> np.ndarray:
    """Key ranges ``[q_len, R, 2]`` of a mask function; see :meth:`dcp.AttnMask.from_mask_mod`."""
    if not callable(fn):
        raise ValueError(f"a mask_mod is a function (b, h, q, kv) -> bool, got {shown(fn)}")
    at_head = 0 if head is None else whole("head", head)
    at_batch = 0 if batch is None else whole("batch", batch)
    heads = None if num_heads is None else whole("num_heads", num_heads, least=1)
    mod = _MaskMod(fn, q_len, k_len)
    pieces = [dense_to_ranges(mod.seen(([at_batch], [at_head]), *band)[0]) for band in mod.bands()]
    if not pieces:
        return np.zeros((q_len, 0, 2), dtype=np.int64)
    last_head, last_batch = at_head, at_batch
    if head is None:
        last_head = (heads or mod.count(lambda number: (at_batch, number))) - 1
        mod.compare([(at_batch, number) for number in range(last_head + 1)])
    if batch is None:
        last_batch = mod.count(lambda number: (number, at_head)) - 1
        mod.compare([(number, at_head) for number in range(last_batch + 1)])
    # both anew, one by one: a function may read its b and h otherwise than element by element
    for b, h in ((1, 2), (last_batch, last_head)):
        other = b if batch is None else at_batch, h if head is None else at_head
        if other[0] <= last_batch and other[1] <= last_head and other != (at_batch, at_head):
            mod.compare([(at_batch, at_head), other], at_once=False)
    most = max(piece.shape[1] for piece in pieces)
    return np.concatenate([np.pad(p, ((0, 0), (0, most - p.shape[1]), (0, 0))) for p in pieces])


@dataclass(frozen=True)
class _MaskMod:
    """A mask function over all queries and keys of a sequence."""

    fn: Callable[..., Any]
    q_len: int
    k_len: int

    def bands(self, shares: int = 1) -> Iterator[tuple[int, int]]:
        """Rows to evaluate together, [first, stop), where that is done ``shares`` times."""
        step = max(1, _PAIRS // shares // max(self.k_len, 1))
        for first in range(0, self.q_len if self.k_len else 0, step):
            yield first, min(first + step, self.q_len)

    def seen(self, of: Of, first: int, stop: int) -> np.ndarray:
        """Boolean ``[1 or n, rows, keys]``: 1 where none of the n batches and heads matters."""
        index = _index_backend()
        shape = (-1, 1, 1) if len(of[0]) > 1 else (1, 1)
        b, h = (index(np.array(numbers, dtype=np.int64).reshape(shape)) for numbers in of)
        rows = index(np.arange(first, stop, dtype=np.int64)[:, None])
        try:
            result = self.fn(b, h, rows, index(np.arange(self.k_len, dtype=np.int64)[None, :]))
        except Exception as error:
            raise ValueError(
                f"mask_mod raised {type(error).__name__} for batch {of[0][-1]}, head {of[1][-1]}, "
                f"queries [{first}, {stop}) and {self.k_len} keys: {shown(str(error))}"
            ) from error
        seen = _checked(result, (stop - first, self.k_len), len(of[0]))
        return np.broadcast_to(seen, (len(seen), stop - first, self.k_len))

    def count(self, of: Callable[[int], tuple[int, int]]) -> int:
        """Up to which number, at most :data:`PROBED`, the function takes heads or batches."""

        def beyond(number: int) -> bool:
            b, h = of(number)
            try:
                self.seen(([b], [h]), 0, 1)
            except ValueError:  # a table of heads ends here
                return True
            return False

        return bisect_left(range(1, PROBED), True, key=beyond) + 1

    def compare(self, pairs: list[tuple[int, int]], *, at_once: bool = True) -> None:
        """Raise for the first two of some (batch, head) under which a pair is and is not seen."""
        of: Of = ([b for b, _ in pairs], [h for _, h in pairs])
        if at_once:
            try:
                if len(self.seen(of, 0, 1)) == 1:
                    return
            except ValueError:  # it branches on the head, for instance
                at_once = False
        for band in self.bands(shares=len(pairs)):
            if at_once:
                seen = self.seen(of, *band)
            else:
                seen = np.concatenate([self.seen(([b], [h]), *band) for b, h in pairs])
            differs = (seen != seen[:1]).reshape(len(seen), -1)
            if bad := first_true(differs.any(axis=1)):
                query, key = divmod(first_true(differs[bad[0]])[0], self.k_len)
                _refuse(pairs[0], pairs[bad[0]], band[0] + query, key)


def _refuse(one: tuple[int, int], other: tuple[int, int], query: int, key: int) -> None:
    where = f"differ at query {query}, key {key}"
    if one[1] == other[1]:
        raise ValueError(
            f"mask_mod depends on the batch: batches {one[0]} and {other[0]} {where}. A mask is "
            "that of one sequence: make one for each with batch="
        )
    both = "" if one[0] == other[0] else f" in batches {one[0]} and {other[0]}"
    raise ValueError(
        f"mask_mod depends on the head: heads {one[1]} and {other[1]}{both} {where}. A mask is "
        "that of all heads: plan one for each as named masks, "
        '{"head0": from_mask_mod(fn, q_len, k_len, head=0), …}, or take one with head='
    )


def _checked(result: Any, shape: tuple[int, int], count: int) -> np.ndarray:
    """What a mask function returned as booleans ``[1 or count, …]`` that broadcast to ``shape``."""
    dtype = str(getattr(result, "dtype", type(result).__name__)).removeprefix("torch.")
    if dtype != "bool" and not dtype.startswith(("int", "uint")):
        what = f"{dtype} scores" if dtype.startswith(("float", "bfloat")) else dtype
        raise ValueError(f"mask_mod returned {what} ({shown(result)}): it must return booleans")
    array = np.asarray(result)
    fits = array.ndim in (0, 2) or (array.ndim == 3 and count > 1 and array.shape[0] in (1, count))
    if not fits or any(n not in (1, of) for n, of in zip(array.shape[-2:], shape, strict=False)):
        raise ValueError(
            f"mask_mod returned shape {array.shape} for {shape[0]} queries x {shape[1]} keys: "
            "it must return a boolean for every pair"
        )
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        wrong = array[~np.isin(array, (0, 1))].flat[0]
        raise ValueError(f"mask_mod returned the integer {wrong}: it must return booleans")
    return array.astype(bool).reshape((1,) * (3 - array.ndim) + array.shape)


def _index_backend() -> Callable[[np.ndarray], Any]:
    try:
        import torch
    except ImportError:
        return lambda array: array
    return torch.from_numpy
