"""One mask of every kind, as functions of a sequence's length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dcp import AttnMask

MASKS: dict[str, Callable[[int], AttnMask]] = {
    "full": AttnMask.full,
    "causal": AttnMask.causal,
    "sliding_window": lambda n: AttnMask.sliding_window(n, 20),
    "streaming": lambda n: AttnMask.streaming(n, sink=3, window=21),
    "causal_blockwise": lambda n: AttnMask.causal_blockwise(n, block=16, local_blocks=2),
    "shared_question": AttnMask.shared_question,
    "prefix_lm": lambda n: AttnMask.prefix_lm(n, 30),
    "documents": lambda n: AttnMask.documents([n // 3, 0, n - n // 3]),
    "modality": lambda n: AttnMask.modality([n // 4, n - n // 4 - n // 3], n // 3),
    "modality_alone": lambda n: AttnMask.modality([n // 4, n - n // 4 - n // 3], n // 3, True),
    "slices": lambda n: AttnMask.from_slices(
        n, n, [(0, n // 2, 0, n // 2, "inv_causal"), (n // 2, n, 0, n, "bi_causal")]
    ),
    "ranges": lambda n: AttnMask.from_ranges(
        np.sort(np.random.default_rng(n).integers(0, n + 1, (n, 3, 2)), axis=2)
    ),
}
