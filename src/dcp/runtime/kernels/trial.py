"""A kernel on a small case before it is trusted: a device, driver or compiler may break what tests
elsewhere have shown."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.masks import AttnMask
from dcp.planner import plan
from dcp.program import MaskProgram
from dcp.runtime.kernels import Kernel, Options, pack_kv, split_kv
from dcp.runtime.reference import dense_attention, relative_error

SEQLENS = (330, 300)  # the longer one first, as it is placed; causal tiles of 128 × 128 are full
HEADS, KV_HEADS = 4, 2
MOST = 3.0  # times the error of dense attention in the same dtype
LEAST = 1e-6  # relative error that is none


def trial(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    options: Options,
    *,
    heads: int = HEADS,
) -> str | None:
    """None, or how far the kernel is from dense attention on the device."""
    for name, (error, usual) in trial_errors(kernel, device, dtype, options, heads=heads).items():
        if not error <= MOST * usual + LEAST:
            return f"its {name} is off by {error:.1e}, dense attention's in {dtype} by {usual:.1e}"
    return None


def trial_errors(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    options: Options,
    *,
    heads: int = HEADS,
) -> dict[str, tuple[float, float]]:
    """Relative errors of what the kernel gives for a small batch, forward and (if the call will
    need them) gradients, each beside that of dense attention in the same dtype."""
    program, seen = _case(heads, options.head_dim, options.value_dim or options.head_dim)
    [work] = kernel.prepare(program, device, widest=options.widest, dtype=dtype).values()
    generator = torch.Generator().manual_seed(0)
    value_dim, tokens = options.value_dim or options.head_dim, len(seen)
    shapes = (
        (tokens, heads, options.head_dim),
        (tokens, KV_HEADS, options.head_dim),
        (tokens, KV_HEADS, value_dim),
        (tokens, heads, value_dim),
    )
    q, k, v, grad_out = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes
    )
    mask = seen.to(device)
    exact = _dense(q.double(), k.double(), v.double(), grad_out.double(), mask, options)
    dense = _dense(q, k, v, grad_out, mask, options)
    found = _run(kernel, work, q, k, v, grad_out, exact[0], exact[1], options)
    return {
        name: (relative_error(ours, wanted), relative_error(theirs, wanted))
        for name, ours, theirs, wanted in zip(
            ("out", "lse", "dq", "dk", "dv"), found, dense, exact, strict=False
        )
    }


@lru_cache(maxsize=4)
def _case(heads: int, head_dim: int, value_dim: int) -> tuple[MaskProgram, Tensor]:
    """One rank's program, and which pairs count."""
    masks = [AttnMask.streaming(SEQLENS[0], sink=16, window=64), AttnMask.causal(SEQLENS[1])]
    spec = AttentionSpec(
        num_heads=heads, num_kv_heads=KV_HEADS, head_dim=head_dim, value_dim=value_dim
    )
    made = plan(
        SequenceBatch(SEQLENS, masks), spec, Cluster(devices_per_node=1), strategy="data_parallel"
    )
    dense = torch.block_diag(*(torch.from_numpy(mask.to_dense()) for mask in masks))
    return made.rank_plan(0).mask_program(), dense.bool()


def _run(
    kernel: Kernel, work: object, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor,
    out: Tensor, lse: Tensor, options: Options,
) -> list[Tensor]:  # fmt: skip
    """What the kernel finds; its backward pass begins with the exact ``out`` and ``lse``."""
    to, results = kernel.input_dtype(q.dtype), kernel.compute_dtype(q.dtype)
    q, kv, grad_out = (x.to(to) for x in (q, pack_kv((k, v)), grad_out))
    own_out, grad_q, grad_kv = (
        torch.zeros(like.shape, dtype=results, device=q.device) for like in (out, q, kv)
    )
    own_lse = torch.full(lse.shape, -torch.inf, dtype=results, device=q.device)
    kernel.forward(work, q, kv, own_out, own_lse, options)
    if not options.needs_grad:
        return [own_out, own_lse]
    # kernels read buffers, which are contiguous; what einsum leaves may not be
    out, lse = (x.to(results).contiguous() for x in (out, lse))
    sides = (q, grad_out, lse, (grad_out.to(results) * out).sum(dim=-1))
    kernel.backward(work, sides, kv, grad_q, grad_kv, options)
    return [own_out, own_lse, grad_q, *split_kv(grad_kv, options.head_dim)]


def _dense(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, mask: Tensor, options: Options
) -> list[Tensor]:
    """out, lse, dq, dk and dv by plain products, in the tensors' dtype."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out, lse = dense_attention(q, k, v, mask, scale=options.scale, softcap=options.softcap)
        grads = torch.autograd.grad(out, (q, k, v), grad_out)
    return [out.detach(), lse.detach(), *grads]
