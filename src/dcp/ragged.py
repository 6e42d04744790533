"""Runs of different lengths, one after the other in flat arrays."""

from __future__ import annotations

import numpy as np


def starts(length: np.ndarray) -> np.ndarray:
    """Where each run begins: the sum of the lengths before it."""
    begin: np.ndarray = np.cumsum(length) - length
    return begin


def expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For runs of ``counts`` items: which run each item is of, and its index inside the run."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, np.arange(len(run)) - starts(counts)[run]


def runs(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``start[0], start[0] + 1, …`` for ``length[0]`` values, then the next run."""
    run, index = expand(length)
    values: np.ndarray = start[run] + index
    return values


def split(values: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """The runs of ``counts`` values, one array each."""
    ends = np.cumsum(counts).tolist()
    return [values[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)] if ends else []


def offsets_in(group: np.ndarray, length: np.ndarray, num_groups: int) -> np.ndarray:
    """For runs dealt to groups, in order: the lengths before each run in its own group."""
    order = np.argsort(group, kind="stable")
    total = np.bincount(group, weights=length, minlength=num_groups).astype(np.int64)
    offsets = np.empty(len(group), dtype=np.int64)
    offsets[order] = starts(length[order]) - starts(total)[group[order]]
    return offsets
