"""One Triton kernel with one tile: whether it is right on a device, and what it takes there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.planner import plan
from dcp.program import MaskProgram
from dcp.runtime.kernels import Options
from dcp.runtime.kernels.device_clock import device_medians
from dcp.runtime.kernels.trial import trial
from dcp.runtime.kernels.triton import TritonKernel, launch, place_tables
from dcp.runtime.kernels.triton_options import DEFAULT, TritonOptions
from dcp.runtime.kernels.triton_shapes import (
    ARCHITECTURES,
    SHAPES,
    Shape,
    Shapes,
    choose_shapes,
    padded,
)

KERNELS = tuple(field.name for field in fields(Shapes))
# "outer inner warps stages" beside the shapes of all architectures, in half precision up to
# head_dim 128: those whose loop over full tiles compiles without spills, and FlexAttention's.
CANDIDATES = {
    "forward": "128 64 8 3, 128 64 8 2, 128 64 8 4, 128 128 8 2, 128 32 8 4, 64 64 4 3, 64 64 4 2",
    "query_gradient": "128 64 8 2, 128 64 8 3, 128 32 8 3, 128 32 8 2, 64 64 4 2, 64 32 4 3",
    "key_gradient": "128 32 8 2, 128 32 8 3, 128 64 8 2, 128 64 8 1, 64 64 8 2, 64 64 4 2",
}
# of all kernels in float32 and at head_dim 256
SMALL = "64 64 8 2, 64 64 8 1, 64 32 8 2, 64 32 4 2, 32 64 4 1, 32 32 8 2, 32 32 4 1, 16 16 4 1"
TOKENS, KV_HEADS, REPEAT = 8192, 8, 5  # of the timed case: one causal sequence

Timed = Callable[[str, Shape], float]
"""Seconds of one of :data:`KERNELS` with a tile; raises where it does not compile or is wrong."""


def candidates(name: str, usual: Shapes, widest: int, itemsize: int) -> list[Shape]:
    """Tiles of a kernel that are worth timing, the usual one first."""
    width = max(64, padded(widest))
    listed = CANDIDATES[name.removeprefix("atomic_")] if itemsize == 2 and width <= 128 else SMALL
    tables = [usual, *(SHAPES[each, width, itemsize] for each in ARCHITECTURES)]
    first, *others = (getattr(table, name) for table in tables)
    return list(dict.fromkeys([first, *map(Shape.parse, listed.split(",")), *others]))


def on_device(device: torch.device, widest: int, dtype: torch.dtype, forms: TritonOptions) -> Timed:
    """What compares a kernel with dense attention and then times it there."""
    spec = AttentionSpec(
        num_heads=KV_HEADS * max(4, forms.pack_heads),
        num_kv_heads=KV_HEADS,
        head_dim=widest,
        dtype=str(dtype).removeprefix("torch."),
    )

    def timed(name: str, shape: Shape) -> float:
        if (fault := wrong(name, shape, device, widest, dtype, forms)) is not None:
            raise ValueError(fault)
        with torch.cuda.device(device):
            work = launch_of(name, shape, spec, device, tokens=TOKENS, forms=forms)
            return device_medians({"ours": work}, REPEAT)["ours"]

    return timed


def wrong(
    name: str,
    shape: Shape,
    device: torch.device,
    widest: int,
    dtype: torch.dtype,
    forms: TritonOptions,
) -> str | None:
    """None, or how far the kernel with this tile, the others as usual, is from dense attention."""
    usual = choose_shapes(device, widest, dtype)
    if name in ("forward", "query_gradient"):
        shapes = replace(usual, forward=shape, query_gradient=shape)
    else:
        shapes = replace(usual, key_gradient=shape, atomic_key_gradient=shape)
    options = Options(
        widest,
        widest**-0.5,
        deterministic=name != "atomic_key_gradient",
        needs_grad=name != "forward",
    )
    heads = max(4, 2 * forms.pack_heads)
    return trial(_WithShapes(shapes, forms), device, dtype, options, heads=heads)


class _WithShapes(TritonKernel):
    """With tiles of one's own."""

    def __init__(self, shapes: Shapes, forms: TritonOptions) -> None:
        super().__init__(forms)
        self._shapes = shapes

    def shapes(self, device: torch.device, widest: int, dtype: torch.dtype) -> Shapes:
        return self._shapes


def launch_of(
    name: str,
    shape: Shape,
    spec: AttentionSpec,
    device: torch.device,
    *,
    tokens: int,
    forms: TritonOptions = DEFAULT,
) -> Callable[[], Any]:
    """One launch of the kernel on one causal sequence, on random tensors."""
    program = _causal(spec, tokens)
    [work] = place_tables(program, device, Shapes.alike(shape), forms=forms).values()
    generator = torch.Generator(device).manual_seed(0)  # what the user draws stays as it was

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(
            shape, device=device, dtype=getattr(torch, spec.dtype), generator=generator
        )

    q, grad_out, out = (random(tokens, spec.num_heads, spec.head_dim) for _ in range(3))
    kv = random(tokens, 2, spec.num_kv_heads, spec.head_dim)
    lse = torch.full((tokens, spec.num_heads), -torch.inf, device=device)
    atomic = name == "atomic_key_gradient"
    options = Options(spec.head_dim, spec.head_dim**-0.5, deterministic=not atomic)
    if name == "forward":

        def forward() -> None:
            lse.fill_(-torch.inf)
            launch(name, (q, kv, out, lse), work, kv, options)

        return forward
    to = torch.float32 if atomic else q.dtype  # which only results written once may have
    grads = [torch.zeros_like(each, dtype=to) for each in (q, kv)]
    code = name.removeprefix("atomic_")
    tensors = (q, grad_out, lse.fill_(10.0), torch.zeros_like(lse), kv, *grads)
    tensors = tensors if code == "key_gradient" else tensors[:-1]
    return lambda: launch(code, tensors, work, kv, options)


def _causal(spec: AttentionSpec, tokens: int) -> MaskProgram:
    made = plan(
        SequenceBatch([tokens]), spec, Cluster(devices_per_node=1), strategy="data_parallel"
    )
    return made.rank_plan(0).mask_program()
