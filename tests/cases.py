"""Random batches and clusters that tests share."""

import numpy as np
from hypothesis import strategies as st

from dcp import AttnMask, Cluster, SequenceBatch


@st.composite
def masks_of(draw, seqlen: int) -> AttnMask:
    kind = draw(st.sampled_from(["causal", "full", "window", "streaming", "ranges", "none"]))
    match kind:
        case "causal":
            return AttnMask.causal(seqlen)
        case "full":
            return AttnMask.full(seqlen)
        case "window":
            return AttnMask.sliding_window(seqlen, draw(st.integers(1, 20)))
        case "streaming":
            return AttnMask.streaming(seqlen, draw(st.integers(0, 5)), draw(st.integers(1, 20)))
        case "none":
            return AttnMask.from_slices(seqlen, seqlen, [])
    seed = draw(st.integers(0, 99))
    ranges = np.random.default_rng(seed).integers(0, seqlen + 1, (seqlen, 2, 2))
    return AttnMask.from_ranges(ranges)


@st.composite
def cases(draw):
    seqlens = draw(st.lists(st.integers(0, 60), max_size=6))
    batch = SequenceBatch(seqlens, [draw(masks_of(n)) for n in seqlens])
    nodes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    return batch, Cluster(num_nodes=len(nodes), devices_per_node=nodes)
