"""Loaders of a few documents, and pools to plan in, for the tests of ``dcp.data``."""

from concurrent.futures import Future

import numpy as np

from dcp import AttentionSpec, DCPDataLoader
from dcp.data.messages import answer_from_bytes
from dcp.data.worker import answer_or_refusal

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
LENGTHS = [5, 70, 0, 33, 1, 12, 64, 3, 28]


def documents_of(lengths):
    """Token vectors; every token says its document (thousands) and its place in it."""
    return [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]


DOCUMENTS = documents_of(LENGTHS)


def loader_of(dataset=DOCUMENTS, mask_fn="causal", **options):
    """A loader that plans by a quick rule, in this process unless told otherwise."""
    options = {"tokens_per_batch": 64, "over_long": "split", "num_workers": 0} | options
    options.setdefault("plan_options", {"strategy": "zigzag"})
    return DCPDataLoader(dataset, mask_fn, spec=SPEC, **options)


def drain(loader):
    """Tokens, labels and positions of an epoch, batch by batch, and the counts."""
    return [
        (b.tokens.tolist(), b.labels.tolist(), b.positions.tolist(), b.num_loss_tokens)
        for b, _ in loader
    ]


def worker_pids(pool):
    """Process ids of the workers of a ``PlanningPool``."""
    return [worker.process.pid for worker in pool._jobs.workers]


class AtOnce:
    """A pool that has planned a request when ``submit`` returns."""

    def submit(self, request):
        future = Future()
        future.set_result(answer_from_bytes(answer_or_refusal(request)))
        return future

    def close(self):
        pass
