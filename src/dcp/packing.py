"""How long sequences and masks may be, and the segments of packed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dcp.checks import not_too_many, shown, whole, whole_numbers
from dcp.ragged import starts
from dcp.slices import first_true

MOST_TOKENS = 2**31 - 1  # of a sequence: pairs, up to their square, are counted in 64 bits
MOST_SLICES = 2**22  # that a constructor makes of a number
Segments = Sequence[tuple[int, int]] | np.ndarray | None


def tokens_of(value: Any, name: str = "seqlen") -> int:
    return whole(name, value, most=MOST_TOKENS)


def size(name: str, value: Any, *, least: int = 0) -> int:
    """A size that may be larger than any sequence, such as a window: then it is MOST_TOKENS + 1."""
    return min(whole(name, value, least=least, most=10**100), MOST_TOKENS + 1)


def packed_runs(name: str, lengths: Any, *, before: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """First tokens and ends of runs that have any, packed behind ``before`` others."""
    sizes = whole_numbers(name, lengths, most=MOST_TOKENS)
    sizes = sizes[sizes > 0]
    not_too_many(name, len(sizes), MOST_SLICES, "plan them as several sequences")
    tokens_of(before + int(sizes.sum()), f"the tokens of {name}")
    start = before + starts(sizes)
    return start, start + sizes


def triangles(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """A causal slice for each run of tokens."""
    return np.stack([start, end, start, end, start - end, 0 * start], axis=1)


def checked_segments(given: Segments, num_tokens: int) -> np.ndarray:
    """Segments of a mask, checked: int64 ``[n, 2]``."""
    if given is None:
        return np.zeros((1, 2), dtype=np.int64)
    try:
        found = np.array(given)
    except ValueError:  # rows of different lengths
        found = np.zeros(0)
    if found.ndim != 2 or found.shape[1] != 2 or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(
            f"segments must be rows (first token, its position), integers, got {shown(given)}"
        )
    found = found.astype(np.int64)
    first, position = found.T
    if first[0] != 0 or (np.diff(first) <= 0).any() or first[-1] >= max(num_tokens, 1):
        raise ValueError(
            f"segments must begin at token 0, then ascend within {num_tokens} tokens, got first "
            f"tokens {shown(first.tolist())}"
        )
    if bad := first_true((position < 0) | (position > MOST_TOKENS)):
        raise ValueError(
            f"segment {bad[0]} begins at position {position[bad[0]]}: it must be 0 or more and at "
            f"most {MOST_TOKENS}"
        )
    return found
