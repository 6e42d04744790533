"""Tile shapes of the Triton kernels, timed one by one: ``dcp bench kernels --only tune``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dcp.bench.kernels_gpu import PICK_TOKENS, SPEC, one_rank
from dcp.bench.rivals import device_medians
from dcp.runtime.kernels.triton import launch, place_tables
from dcp.runtime.kernels.triton_shapes import Shape, Shapes, choose_shapes
from dcp.runtime.session import Call

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
    for name, shapes in CANDIDATES.items():
        now = shape_in_use(name)
        yield name, now
        for text in shapes.split(", "):
            shape = Shape.parse(text)
            if shape != now:
                yield name, shape


def shape_rate(name: str, shape: Shape, repeat: int) -> tuple[float, str]:
    """TFLOP/s of one kernel with this tile on one causal sequence."""
    seconds = device_medians({"ours": launch_of(name, shape, torch.device("cuda"))}, repeat)["ours"]
    pairs = PICK_TOKENS**2 / 2 * SPEC.num_heads
    note = "in use" if shape == shape_in_use(name) else ""
    return FLOPS[name] * 2 * SPEC.head_dim * pairs / seconds / 1e12, note


def shape_in_use(name: str) -> Shape:
    device, dtype = torch.device("cuda"), getattr(torch, SPEC.dtype)
    shape: Shape = getattr(choose_shapes(device, SPEC.head_dim, dtype), name)
    return shape


def launch_of(name: str, shape: Shape, device: torch.device) -> Callable[[], Any]:
    """One launch of the kernel, on random tensors."""
    shapes = Shapes.alike(shape)
    dtype = getattr(torch, SPEC.dtype)
    program = one_rank("causal", [PICK_TOKENS]).mask_program()
    [work] = place_tables(program, device, shapes).values()
    heads, kv_heads, head_dim = SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim
    q, grad_out, out = (
        torch.randn(PICK_TOKENS, heads, head_dim, device=device, dtype=dtype) for _ in range(3)
    )
    kv = torch.randn(PICK_TOKENS, 2, kv_heads, head_dim, device=device, dtype=dtype)
    lse = torch.full((PICK_TOKENS, heads), -torch.inf, device=device)
    options = Call().options(SPEC, needs_grad=True)
    if name == "forward":

        def forward() -> None:
            lse.fill_(-torch.inf)
            launch(name, (q, kv, out, lse), work, kv, options)

        return forward
    grads = [torch.zeros_like(q), torch.zeros_like(kv)][: 1 + (name == "key_gradient")]
    tensors = (q, grad_out, lse.fill_(10.0), torch.zeros_like(lse), kv, *grads)
    return lambda: launch(name, tensors, work, kv, options)
