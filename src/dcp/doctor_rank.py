"""One rank of ``dcp doctor``: runs a plan over the group and leaves what it saw.

Started by :func:`dcp.launch.local.run_ranks`. The folder holds ``case.plan``; every rank adds
its spans and how far its result lies from the same plan run in one process.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from dcp.launch.local import joined_group
from dcp.plans import Plan
from dcp.runtime import AttentionExecutor, LocalWorld

PLAN, SPANS = "case.plan", "rank-{}.json"


def main() -> None:
    """Forward and backward twice, the second time recorded."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--store")
    args = parser.parse_args()
    with joined_group(args.store):
        made, executor = Plan.load(args.folder / PLAN), AttentionExecutor()
        executor.prepare(made)
        _run(made, executor)
        executor.spans = []
        error = _run(made, executor)
        found = {"error": error, "spans": [asdict(span) for span in executor.spans]}
        (args.folder / SPANS.format(executor.rank)).write_text(json.dumps(found))


def _run(made: Plan, executor: AttentionExecutor) -> float:
    """One call; the largest difference from the plan's ranks in one process."""
    spec, tokens = made.spec, made.num_tokens
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    q = torch.randn(tokens, spec.num_heads, spec.head_dim, generator=generator, dtype=dtype)
    kv = torch.randn(tokens, 2, spec.num_kv_heads, spec.head_dim, generator=generator, dtype=dtype)
    wanted = [q.requires_grad_(), kv.requires_grad_()]
    k, v = kv.unbind(1)
    whole = LocalWorld(made).attention(q, k, v)
    assert isinstance(whole, torch.Tensor)
    whole_gradients = torch.autograd.grad(whole.sum(), wanted)

    local = [made.shard(executor.rank, tensor.detach()).requires_grad_() for tensor in wanted]
    dist.barrier()
    out = executor.attention(*local)
    out.sum().backward()
    pairs = [(out, whole), *zip((x.grad for x in local), whole_gradients, strict=True)]
    return max(
        float((a - made.shard(executor.rank, b)).detach().abs().max()) if a.numel() else 0.0
        for a, b in pairs
    )


if __name__ == "__main__":
    main()
