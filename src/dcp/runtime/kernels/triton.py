"""Attention by Triton kernels over tile tables: one launch a division forward, one or two backward.

The kernels run on GPUs, and on any machine in Triton's interpreter (``TRITON_INTERPRET=1`` in the
environment before anything imports Triton). Their code: :mod:`dcp.runtime.kernels.triton_code`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.program import MaskProgram
from dcp.runtime.division import (
    attention_steps,
    merged_slices,
    row_runs,
)
from dcp.runtime.kernels import Options
from dcp.runtime.kernels.tile_table import TileTable, build_table, by_key, by_query
from dcp.runtime.rows import copy_to_device
from dcp.tables import Item

NAME = "triton"
WRITES_ONCE = True
MAX_HEAD_DIM = 256
DELTA_ROWS, DELTA_WARPS = 32, 4  # rows of one program that sums products of rows


@dataclass(frozen=True)
class Shape:
    """Tile of one kernel: rows kept, rows visited at a time, warps, stages of the pipeline."""

    outer: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shapes:
    """Tiles of the three kernels. The two with queries outside share one table."""

    forward: Shape
    query_gradient: Shape
    key_gradient: Shape


# By padded head dimension and bytes of an element. Chosen for the fewest spilled registers when
# compiled for compute capability 9.0, within an A100's shared memory; ``docs/kernels.md`` has the
# list. Not measured on a device yet.
SHAPES = {
    (64, 2): Shapes(Shape(128, 64, 8, 3), Shape(128, 64, 8, 3), Shape(64, 64, 8, 2)),
    (128, 2): Shapes(Shape(128, 64, 8, 3), Shape(128, 64, 8, 2), Shape(128, 32, 8, 2)),
    (256, 2): Shapes(Shape(64, 32, 8, 2), Shape(64, 32, 8, 2), Shape(32, 32, 8, 1)),
    (64, 4): Shapes(Shape(64, 32, 8, 2), Shape(64, 32, 8, 2), Shape(32, 32, 8, 2)),
    (128, 4): Shapes(Shape(32, 32, 8, 2), Shape(32, 32, 8, 2), Shape(32, 32, 8, 1)),
    (256, 4): Shapes(Shape(16, 16, 8, 1), Shape(16, 16, 8, 1), Shape(16, 16, 8, 1)),
}
# The interpreter's cost is per operation, not per element.
INTERPRETER = Shapes(Shape(64, 32, 4, 1), Shape(64, 32, 4, 1), Shape(32, 64, 4, 1))


def supports(device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
    """None, or why this kernel cannot serve."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {dtype}"
    if device.type == "cuda" or (device.type == "cpu" and _interprets()):
        return None
    return "it runs on CUDA devices, and on the CPU in Triton's interpreter only"


def input_dtype(dtype: torch.dtype) -> torch.dtype:
    """Inputs stay as they are."""
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Results are summed in float32."""
    return torch.float32


@dataclass(frozen=True)
class Work:
    """One division: where its tables lie in the program's ``table`` (int32, on the device)."""

    table: Tensor
    queries: tuple[int, int, int, int, int]  # first tile, number of tiles, offsets of the 3 tables
    keys: tuple[int, int, int, int, int]
    shapes: Shapes


def prepare(
    program: MaskProgram,
    device: torch.device,
    *,
    head_dim: int,
    dtype: torch.dtype,
    shapes: Shapes | None = None,
) -> dict[int, Work]:
    """Tables of all divisions, forward and backward, in one copy to the device."""
    shapes = shapes or choose_shapes(device, head_dim, dtype)
    steps = attention_steps(program)
    tables = division_tables([step.items for step in steps], program.slices, shapes)
    parts = [part for table in tables for part in (table.tiles, table.entries, table.bands)]
    offsets = np.cumsum([0, *(part.size for part in parts)]).tolist()
    on_device = copy_to_device(np.concatenate([part.reshape(-1) for part in parts]), device)
    work = {}
    for index, step in enumerate(steps):
        places = []
        for side, table in enumerate(tables):
            first, end = table.tile_start[index : index + 2].tolist()
            places.append((first, end - first, *offsets[3 * side : 3 * side + 3]))
        work[step.step] = Work(on_device, places[0], places[1], shapes)
    return work


def division_tables(
    items: list[np.ndarray], slices: np.ndarray, shapes: Shapes
) -> tuple[TileTable, TileTable]:
    """Tables with queries outside and with keys outside, of all divisions."""
    merged = [merged_slices(each, slices) for each in items]
    division = np.repeat(np.arange(len(merged)), [len(each) for each in merged])
    together = np.concatenate([np.zeros((0, 8), dtype=np.int64), *merged])
    queries = build_table(
        division,
        *by_query(together),
        [
            row_runs(each[:, Item.Q_ROW], each[:, Item.OUT_ROW], each[:, Item.Q_ROWS])
            for each in items
        ],
        outer=shapes.forward.outer,
        inner=shapes.forward.inner,
    )
    keys = build_table(
        division,
        *by_key(together),
        [
            row_runs(each[:, Item.KV_ROW], each[:, Item.DKV_ROW], each[:, Item.KV_ROWS])
            for each in items
        ],
        outer=shapes.key_gradient.outer,
        inner=shapes.key_gradient.inner,
    )
    return queries, keys


def choose_shapes(device: torch.device, head_dim: int, dtype: torch.dtype) -> Shapes:
    """The tiles for a device, head dimension and dtype."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim}: the triton kernel serves up to {MAX_HEAD_DIM}")
    if device.type == "cpu":
        return INTERPRETER
    return SHAPES[max(64, _padded(head_dim)), dtype.itemsize]


def delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """See :mod:`dcp.runtime.kernels`; in one pass over memory."""
    count, head_dim = grad_out.shape[:-1].numel(), grad_out.shape[-1]
    sums = torch.empty(grad_out.shape[:-1], dtype=torch.float32, device=grad_out.device)
    _start(
        "delta_kernel",
        -(-count // DELTA_ROWS),
        (grad_out.contiguous(), out.contiguous(), sums, count),
        HEAD_DIM=head_dim,
        D=_padded(head_dim),
        ROWS=DELTA_ROWS,
        num_warps=DELTA_WARPS,
    )
    return sums


def forward(work: Work, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options) -> None:
    """See :mod:`dcp.runtime.kernels`."""
    shape = work.shapes.forward
    _launch("forward_kernel", (q, kv, out, lse), work, work.queries, shape, q, kv, options)


def backward(
    work: Work,
    q_side: tuple[Tensor, Tensor, Tensor, Tensor],
    kv: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
    options: Options,
) -> None:
    """See :mod:`dcp.runtime.kernels`."""
    for name in ("query_gradient", "key_gradient") if options.deterministic else ("key_gradient",):
        run_gradient(name, work, q_side, kv, grad_q, grad_kv, options)


def run_gradient(
    name: str,
    work: Work,
    q_side: tuple[Tensor, Tensor, Tensor, Tensor],
    kv: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
    options: Options,
) -> None:
    """One of the two launches of :func:`backward`."""
    q, shape = q_side[0], getattr(work.shapes, name)
    if name == "query_gradient":
        tensors: tuple[Tensor, ...] = (*q_side, kv, grad_q)
        _launch(f"{name}_kernel", tensors, work, work.queries, shape, q, kv, options)
        return
    tensors, atomic = (*q_side, kv, grad_q, grad_kv), not options.deterministic
    _launch(f"{name}_kernel", tensors, work, work.keys, shape, q, kv, options, ATOMIC=atomic)


def _launch(
    name: str,
    tensors: tuple[Tensor, ...],
    work: Work,
    place: tuple[int, int, int, int, int],
    shape: Shape,
    q: Tensor,
    kv: Tensor,
    options: Options,
    **constants: Any,
) -> None:
    heads, kv_heads, head_dim = q.shape[1], kv.shape[2], q.shape[2]
    first_tile, num_tiles, *offsets = place
    numbers = options.scale, options.softcap or 1.0
    _start(
        name,
        num_tiles * (kv_heads if name == "key_gradient_kernel" else heads),
        (*tensors, work.table, first_tile, *offsets, heads, kv_heads, *numbers),
        HEAD_DIM=head_dim,
        D=max(16, _padded(head_dim)),
        OUTER=shape.outer,
        INNER=shape.inner,
        SOFTCAP=options.softcap is not None,
        UPCAST=q.device.type == "cpu" and q.dtype != torch.float32,
        num_warps=shape.warps,
        num_stages=shape.stages,
        **constants,
    )


def _start(name: str, programs: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """One launch, on the device of the first argument, which need not be the current one."""
    if programs:
        kernel = getattr(import_module("dcp.runtime.kernels.triton_code"), name)
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


def _padded(head_dim: int) -> int:
    return 1 << (head_dim - 1).bit_length()


@lru_cache(maxsize=1)
def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
