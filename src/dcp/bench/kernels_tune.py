"""Tile shapes of the Triton kernels, timed on this machine's GPU: what to write into ``SHAPES``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dcp.bench.kernels_gpu import SPEC, device_medians, one_rank
from dcp.runtime.kernels import triton as ours
from dcp.runtime.kernels.triton import Shape, Shapes
from dcp.runtime.session import Call

TOKENS = 16384
# "outer inner warps stages" for head_dim 64 and 128 in half precision: shapes whose loop over full
# tiles compiles without spills, and those that FlexAttention takes.
CANDIDATES = {
    "forward": "128 64 8 3, 128 64 8 2, 128 64 8 4, 128 128 8 2, 128 32 8 4, 64 64 4 3, 64 64 4 2",
    "query_gradient": "128 64 8 2, 128 64 8 3, 128 32 8 3, 128 32 8 2, 64 64 4 2, 64 32 4 3",
    "key_gradient": "128 32 8 2, 128 32 8 3, 128 64 8 2, 128 64 8 1, 64 64 8 2, 64 64 4 2",
}
FLOPS = {"forward": 2, "query_gradient": 3, "key_gradient": 4}  # products a pair, times 2 head_dim


def candidates() -> Iterator[tuple[str, Shape]]:
    """(kernel, shape), the one in use first."""
    used = ours.SHAPES[SPEC.head_dim, 2]
    for name, shapes in CANDIDATES.items():
        now = getattr(used, name)
        yield name, now
        for text in shapes.split(", "):
            shape = Shape(*map(int, text.split()))
            if shape != now:
                yield name, shape


def shape_rate(name: str, shape: Shape, repeat: int) -> tuple[float, str]:
    """TFLOP/s of one kernel with this tile on one causal sequence."""
    seconds = device_medians({"ours": launch_of(name, shape, torch.device("cuda"))}, repeat)["ours"]
    pairs = TOKENS**2 / 2 * SPEC.num_heads
    note = "in use" if shape == getattr(ours.SHAPES[SPEC.head_dim, 2], name) else ""
    return FLOPS[name] * 2 * SPEC.head_dim * pairs / seconds / 1e12, note


def launch_of(name: str, shape: Shape, device: torch.device) -> Callable[[], Any]:
    """One launch of the kernel, on random tensors."""
    shapes = replace(ours.SHAPES[SPEC.head_dim, 2], **{name: shape})
    if name == "query_gradient":  # it shares its table with the forward kernel
        shapes = Shapes(shape, shape, shapes.key_gradient)
    dtype = getattr(torch, SPEC.dtype)
    program = one_rank("causal", [TOKENS]).mask_program()
    [work] = ours.place_tables(program, device, shapes).values()
    heads, kv_heads, head_dim = SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim
    q, grad_out, out = (
        torch.randn(TOKENS, heads, head_dim, device=device, dtype=dtype) for _ in range(3)
    )
    kv = torch.randn(TOKENS, 2, kv_heads, head_dim, device=device, dtype=dtype)
    lse = torch.full((TOKENS, heads), -torch.inf, device=device)
    options = Call().options(head_dim, needs_grad=True)
    if name == "forward":

        def forward() -> None:
            lse.fill_(-torch.inf)
            ours.launch(name, (q, kv, out, lse), work, kv, options)

        return forward
    grads = [torch.zeros_like(q), torch.zeros_like(kv)][: 1 + (name == "key_gradient")]
    tensors = (q, grad_out, lse.fill_(10.0), torch.zeros_like(lse), kv, *grads)
    return lambda: ours.launch(name, tensors, work, kv, options)
