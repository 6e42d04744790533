"""What must be the same on all ranks of a loader, else each would train on a batch of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import numpy as np

from dcp.data.contents import Preparation
from dcp.data.datasets import SampleDataset
from dcp.runtime.agreement import digest

NUM_SAMPLED = 8  # documents that ranks compare


def facts_of(preparation: Preparation, lengths: np.ndarray | None) -> dict[str, Any]:
    """The data and what is planned with it; ``lengths`` where this rank knows them all."""
    mask = preparation.mask_fn
    return {
        "lengths": None if lengths is None else (int(lengths.sum()), digest(lengths.tobytes())),
        **sampled_documents(preparation.dataset),
        "spec": preparation.spec,
        "cluster": preparation.cluster,
        "mask": mask if isinstance(mask, str) else getattr(mask, "__qualname__", type(mask)),
        "mask_weights": preparation.mask_weights or {},
        "plan_options": preparation.plan_options,
    }


def sampled_documents(dataset: SampleDataset) -> dict[str, str | None]:
    """What is in a few documents, the same ones for the same length: a line on each.

    Always ``NUM_SAMPLED`` lines. None where there is no such document (a stream has no index), or
    it cannot be read, which comes to light in its turn.
    """
    length = 0 if dataset.is_stream else len(dataset)
    count = min(length, NUM_SAMPLED)
    chosen = np.random.default_rng(0).choice(length, count, replace=False).tolist() if count else []
    found: dict[str, str | None] = {}
    for index in chosen:
        try:
            found[f"document {index}"] = _summary(dataset, index)
        except Exception:
            found[f"document {index}"] = None
    return found | {f"no document {n}": None for n in range(NUM_SAMPLED - count)}


def _summary(dataset: SampleDataset, index: int) -> str:
    """Tokens, and a checksum of all numbers and texts of a sample."""
    raw, tokens = dataset[index], dataset.sample(index).tokens
    crc = crc32(tokens.tobytes())
    if isinstance(raw, Mapping):
        for name in sorted(set(raw) - {"input_ids"}, key=str):
            value = np.asarray(raw[name])
            if value.dtype.kind in "biufU":
                crc = crc32(f"{name}{value.shape}".encode() + value.tobytes(), crc)
    return f"{len(tokens)} tokens, checksum {crc:08x}"
