"""Attention by Triton kernels over tile tables: one launch a division forward, one or two backward.

The kernels run on GPUs, and on any machine in Triton's interpreter (``TRITON_INTERPRET=1`` in the
environment before anything imports Triton). Their code: ``triton_forward.py`` and
``triton_backward.py``, which share ``triton_tiles.py``, and ``triton_rows.py``.
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
from dcp.runtime.kernels.triton_options import DEFAULT, TritonOptions
from dcp.runtime.kernels.triton_shapes import Shape, Shapes, choose_shapes, padded
from dcp.runtime.rows import copy_to_device
from dcp.tables import Item

MAX_HEAD_DIM = 256
CODE = {"forward_kernel": "forward", "delta_kernel": "rows", "merge_kernel": "rows"}  # by file
DELTA_ROWS, DELTA_WARPS = 32, 4  # rows of one program that sums products, or merges results


@dataclass(frozen=True)
class Work:
    """One division: where its tables lie in the program's ``table`` (int32, on the device)."""

    table: Tensor
    queries: tuple[int, int, int, int]  # first tile, number of tiles, offsets of the 2 tables
    keys: tuple[int, int, int, int]
    shapes: Shapes
    forms: TritonOptions


class TritonKernel(Kernel):
    """``forms``: what it does otherwise than by default."""

    name = "triton"
    writes_once = True
    by_name_on = ("cpu",)  # the interpreter

    def __init__(self, forms: TritonOptions = DEFAULT) -> None:
        self.forms = forms

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
        return place_tables(program, device, self.shapes(device, widest, dtype), forms=self.forms)

    def shapes(self, device: torch.device, widest: int, dtype: torch.dtype) -> Shapes:
        """The tiles of its launches."""
        return choose_shapes(device, widest, dtype)

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        """In one pass over memory."""
        count, width = grad_out.shape[:-1].numel(), grad_out.shape[-1]
        sums = torch.empty(grad_out.shape[:-1], dtype=torch.float32, device=grad_out.device)
        _start(
            "delta_kernel",
            -(-count // DELTA_ROWS),
            (grad_out.contiguous(), out.contiguous(), sums, count),
            HEAD_DIM=width,
            D=padded(width),
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
            D=padded(width),
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
    forms: TritonOptions = DEFAULT,
) -> dict[int, Work]:
    """Tables of all divisions by step, forward and backward, in one copy to the device.

    ``items``: by step, what to compute of each division; None: all.
    """
    steps = attention_steps(program)
    chosen = [step.items if items is None else items[step.step] for step in steps]
    tables = division_tables(chosen, program.slices, shapes, forms.pack_heads)
    parts = [part for table in tables for part in (table.tiles, table.entries)]
    offsets = np.cumsum([0, *(part.size for part in parts)]).tolist()
    on_device = copy_to_device(np.concatenate([part.reshape(-1) for part in parts]), device)
    work = {}
    for index, step in enumerate(steps):
        places = []
        for side, table in enumerate(tables):
            first, end = table.tile_start[index : index + 2].tolist()
            places.append((first, end - first, *offsets[2 * side : 2 * side + 2]))
        work[step.step] = Work(on_device, places[0], places[1], shapes, forms)
    return work


def division_tables(
    items: list[np.ndarray], slices: np.ndarray, shapes: Shapes, pack_heads: int = 1
) -> tuple[TileTable, TileTable]:
    """Tables with queries outside and with keys outside, of all divisions."""
    merged = [merged_slices(each, slices) for each in items]
    division = np.repeat(np.arange(len(merged)), [len(each) for each in merged])
    together = np.concatenate([np.zeros((0, 8), dtype=np.int64), *merged])
    (q_outer, q_inner), (k_outer, k_inner) = shapes.queries_tile, shapes.keys_tile
    queries = build_table(
        division,
        *by_query(together),
        [
            row_runs(each[:, Item.Q_ROW], each[:, Item.OUT_ROW], each[:, Item.Q_ROWS])
            for each in items
        ],
        outer=q_outer // pack_heads,
        inner=q_inner,
    )
    keys = build_table(
        division,
        *by_key(together),
        [
            row_runs(each[:, Item.KV_ROW], each[:, Item.DKV_ROW], each[:, Item.KV_ROWS])
            for each in items
        ],
        outer=k_outer,
        inner=k_inner // pack_heads,
    )
    return queries, keys


def launch(
    name: str, tensors: tuple[Tensor, ...], work: Work, kv: Tensor, options: Options
) -> None:
    """One of the three kernels on a division: ``tensors``, queries first, in its code's order."""
    keys_outside = name == "key_gradient"
    first_tile, num_tiles, *offsets = work.keys if keys_outside else work.queries
    q, kv_heads = tensors[0], kv.shape[-2]
    _, heads, head_dim = q.shape
    value_dim = split_kv(kv, head_dim)[1].shape[-1]
    pack = work.forms.pack_heads
    if heads // kv_heads % pack:
        raise ValueError(f"pack_heads={pack} does not divide {heads // kv_heads} heads a KV head")
    constants = constants_of(name, head_dim, value_dim, work.shapes, options, work.forms)
    constants["UPCAST"] = q.device.type == "cpu" and q.dtype != torch.float32
    programs, sums = num_tiles * (kv_heads if keys_outside else heads // pack), None
    if keys_outside:
        constants["PARTS"] = parts = work.forms.parts(programs)
        programs *= parts
        if parts > 1:
            rows, width = programs * constants["OUTER"], constants["D"] + constants["DV"]
            sums = torch.empty(rows, width, dtype=torch.float32, device=q.device)
        tensors = (*tensors, tensors[-1] if sums is None else sums)
    numbers = options.scale, options.softcap or 1.0
    place = first_tile, *offsets
    _start(
        f"{name}_kernel", programs, (*tensors, work.table, *place, heads, kv_heads, *numbers),
        **constants,
    )  # fmt: skip
    if sums is not None:
        names = ("HEAD_DIM", "D", "VALUE_DIM", "DV", "OUTER", "PARTS", "num_warps")
        _start(
            "add_parts_kernel", num_tiles * kv_heads,
            (sums, tensors[-2], work.table, *place[:2], kv_heads),
            **{each: constants[each] for each in names},
        )  # fmt: skip


def constants_of(
    name: str, head_dim: int, value_dim: int, shapes: Shapes, options: Options, forms: TritonOptions
) -> dict[str, Any]:
    """What the compiler takes as constants of one of the three kernels, but for PARTS."""
    keys_outside, atomic = name == "key_gradient", not options.deterministic
    shape: Shape = getattr(shapes, f"atomic_{name}" if keys_outside and atomic else name)
    constants = {
        "HEAD_DIM": head_dim,
        "D": max(16, padded(head_dim)),
        "VALUE_DIM": value_dim,
        "DV": max(16, padded(value_dim)),
        "OUTER": shape.outer,
        "INNER": shape.inner,
        "REPEAT": (shapes.keys_tile if keys_outside else shapes.queries_tile)[1] // shape.inner,
        "SOFTCAP": options.softcap is not None,
        "UPCAST": False,
        "PACK": forms.pack_heads,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }
    whole = constants["D"] == head_dim == value_dim
    constants["DESCRIBED"] = forms.descriptors and whole
    if keys_outside:
        constants |= {"ATOMIC": atomic, "PARTS": 1}
        constants["DESCRIBED"] &= forms.pack_heads == 1
    return constants


def _start(name: str, programs: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """One launch, on the device of the first argument, which need not be the current one."""
    if programs:
        kernel = kernel_code(name)
        with torch.cuda.device_of(arguments[0]):
            if constants.get("DESCRIBED"):
                _give_memory(arguments[0].device)
            kernel[(programs,)](*arguments, **constants)


def kernel_code(name: str) -> Any:
    """A compiled function by name; its file imports Triton."""
    file = CODE.get(name, "backward")
    return getattr(import_module(f"dcp.runtime.kernels.triton_{file}"), name)


def _give_memory(device: torch.device) -> None:
    """Descriptors are made by the kernel, in memory that Triton asks its caller for."""
    from triton import set_allocator

    set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device=device))


@lru_cache(maxsize=1)
def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


KERNEL = TritonKernel()
