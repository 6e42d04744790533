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
from dcp.runtime.kernels import Kernel, Options, QSide, split_kv
from dcp.runtime.kernels.tile_table import TileTable, build_table, by_key, by_query
from dcp.runtime.rows import copy_to_device
from dcp.tables import Item

MAX_HEAD_DIM = 256
DELTA_ROWS, DELTA_WARPS = 32, 4  # rows of one program that sums products, or merges results


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
# Of devices with less shared memory than an A100 (99 KiB a block: 8.6, 8.9, 12.0).
SMALL = {
    (256, 2): Shapes(Shape(64, 32, 8, 1), Shape(64, 32, 8, 1), Shape(32, 32, 8, 1)),
}
LARGE_SHARED_MEMORY = 163 << 10  # bytes a block of an A100
# The interpreter's cost is per operation, not per element.
INTERPRETER = Shapes(Shape(64, 32, 4, 1), Shape(64, 32, 4, 1), Shape(32, 64, 4, 1))


@dataclass(frozen=True)
class Work:
    """One division: where its tables lie in the program's ``table`` (int32, on the device)."""

    table: Tensor
    queries: tuple[int, int, int, int, int]  # first tile, number of tiles, offsets of the 3 tables
    keys: tuple[int, int, int, int, int]
    shapes: Shapes


class TritonKernel(Kernel):
    name = "triton"
    writes_once = True
    by_name_on = ("cpu",)  # the interpreter

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no {dtype}"
        if options.widest > MAX_HEAD_DIM:
            return f"it serves head_dim up to {MAX_HEAD_DIM}, not {options.widest}"
        if device.type == "cuda" or (device.type == "cpu" and _interprets()):
            return None
        return "it runs on CUDA devices, and on the CPU in Triton's interpreter only"

    def prepare(
        self, program: MaskProgram, device: torch.device, *, widest: int, dtype: torch.dtype
    ) -> dict[int, Work]:
        return place_tables(program, device, choose_shapes(device, widest, dtype))

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        """In one pass over memory."""
        count, width = grad_out.shape[:-1].numel(), grad_out.shape[-1]
        sums = torch.empty(grad_out.shape[:-1], dtype=torch.float32, device=grad_out.device)
        _start(
            "delta_kernel",
            -(-count // DELTA_ROWS),
            (grad_out.contiguous(), out.contiguous(), sums, count),
            HEAD_DIM=width,
            D=_padded(width),
            ROWS=DELTA_ROWS,
            num_warps=DELTA_WARPS,
        )
        return sums

    def merge(self, out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
        """In one pass over memory."""
        count, width = lse.numel(), out.shape[-1]
        _start(
            "merge_kernel",
            -(-count // DELTA_ROWS),
            (out, lse, more_out, more_lse, count),
            HEAD_DIM=width,
            D=_padded(width),
            ROWS=DELTA_ROWS,
            num_warps=DELTA_WARPS,
        )

    def forward(
        self, work: Work, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:
        launch("forward", (q, kv, out, lse), work, kv, options)

    def backward(
        self,
        work: Work,
        q_side: QSide,
        kv: Tensor,
        grad_q: Tensor,
        grad_kv: Tensor,
        options: Options,
    ) -> None:
        if options.deterministic:
            launch("query_gradient", (*q_side, kv, grad_q), work, kv, options)
        launch("key_gradient", (*q_side, kv, grad_q, grad_kv), work, kv, options)


def place_tables(
    program: MaskProgram,
    device: torch.device,
    shapes: Shapes,
    *,
    items: dict[int, np.ndarray] | None = None,
) -> dict[int, Work]:
    """Tables of all divisions by step, forward and backward, in one copy to the device.

    ``items``: by step, what to compute of each division; None: all.
    """
    steps = attention_steps(program)
    chosen = [step.items if items is None else items[step.step] for step in steps]
    tables = division_tables(chosen, program.slices, shapes)
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


def choose_shapes(device: torch.device, widest: int, dtype: torch.dtype) -> Shapes:
    """The tiles for a device, head dimension (of keys or values, the larger) and dtype."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    available = getattr(properties, "shared_memory_per_block_optin", 0)
    return shapes_for(widest, dtype.itemsize, small=available < LARGE_SHARED_MEMORY)


def shapes_for(widest: int, itemsize: int, *, small: bool) -> Shapes:
    """The tiles by head dimension and bytes of an element; ``small``: of shared memory."""
    key = max(64, _padded(widest)), itemsize
    return SMALL.get(key, SHAPES[key]) if small else SHAPES[key]


def launch(
    name: str, tensors: tuple[Tensor, ...], work: Work, kv: Tensor, options: Options
) -> None:
    """One of the three kernels on a division: ``tensors``, queries first, in its code's order."""
    shape: Shape = getattr(work.shapes, name)
    keys_outside = name == "key_gradient"
    first_tile, num_tiles, *offsets = work.keys if keys_outside else work.queries
    q, kv_heads = tensors[0], kv.shape[-2]
    _, heads, head_dim = q.shape
    value_dim = split_kv(kv, head_dim)[1].shape[-1]
    numbers = options.scale, options.softcap or 1.0
    _start(
        f"{name}_kernel",
        num_tiles * (kv_heads if keys_outside else heads),
        (*tensors, work.table, first_tile, *offsets, heads, kv_heads, *numbers),
        HEAD_DIM=head_dim,
        D=max(16, _padded(head_dim)),
        VALUE_DIM=value_dim,
        DV=max(16, _padded(value_dim)),
        OUTER=shape.outer,
        INNER=shape.inner,
        SOFTCAP=options.softcap is not None,
        UPCAST=q.device.type == "cpu" and q.dtype != torch.float32,
        num_warps=shape.warps,
        num_stages=shape.stages,
        **({"ATOMIC": not options.deterministic} if keys_outside else {}),
    )


def _start(name: str, programs: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """One launch, on the device of the first argument, which need not be the current one."""
    if programs:
        kernel = getattr(import_module("dcp.runtime.kernels.triton_code"), name)
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


def _padded(width: int) -> int:
    return 1 << (width - 1).bit_length()


@lru_cache(maxsize=1)
def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


KERNEL = TritonKernel()
