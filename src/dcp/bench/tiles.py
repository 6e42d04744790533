"""Tile shapes of the Triton kernels, timed one by one: ``dcp bench kernels --only tune``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dcp.bench.kernels_gpu import PICK_TOKENS, SPEC
from dcp.runtime.kernels import triton_timing
from dcp.runtime.kernels.device_clock import device_medians
from dcp.runtime.kernels.triton_shapes import Shape, Shapes, choose_shapes

# products a pair, times 2 head_dim
FLOPS = {"forward": 2, "query_gradient": 3, "key_gradient": 4, "atomic_key_gradient": 5}


def candidates() -> Iterator[tuple[str, Shape]]:
    """(kernel, shape), the one in use first."""
    usual, itemsize = shapes_in_use(), getattr(torch, SPEC.dtype).itemsize
    for name in FLOPS:
        for shape in triton_timing.candidates(name, usual, SPEC.head_dim, itemsize):
            yield name, shape


def shape_rate(name: str, shape: Shape, repeat: int) -> tuple[float, str]:
    """TFLOP/s of one kernel with this tile on one causal sequence."""
    device = torch.device("cuda")
    work = triton_timing.launch_of(name, shape, SPEC, device, tokens=PICK_TOKENS)
    seconds = device_medians({"ours": work}, repeat)["ours"]
    pairs = PICK_TOKENS**2 / 2 * SPEC.num_heads
    note = "in use" if shape == getattr(shapes_in_use(), name) else ""
    return FLOPS[name] * 2 * SPEC.head_dim * pairs / seconds / 1e12, note


def shapes_in_use() -> Shapes:
    return choose_shapes(torch.device("cuda"), SPEC.head_dim, getattr(torch, SPEC.dtype))
