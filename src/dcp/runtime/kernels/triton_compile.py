"""Compile the Triton kernels for an architecture without having it, and read what came out.

ptxas and cuobjdump come with Triton.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dcp.runtime.kernels import Options
from dcp.runtime.kernels.triton import constants_of, kernel_code
from dcp.runtime.kernels.triton_options import DEFAULT, TritonOptions
from dcp.runtime.kernels.triton_shapes import SHAPES, Shape, Shapes, padded

KERNELS = ("forward", "query_gradient", "key_gradient", "atomic_key_gradient")
_ELEMENTS = {2: "*bf16", 4: "*fp32"}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s*(.*?);", re.MULTILINE)
_JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
_LOCAL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Loop:
    """Instructions of a loop over tiles, a thread's; those of them that reach spilled registers."""

    instructions: int
    spills: int


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel holds.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread, for what does not fit into registers.
        shared_bytes: of a block.
        wgmma, mma_sync, tcgen05: matrix instructions of Hopper, Ampere and Blackwell in its PTX.
        tma, cp_async: asynchronous copies in its PTX, by descriptors and by pointers.
        full: the loop over full tiles; None where there is none, as when a loop was not kept.
        masked: the loop over partly masked tiles.
        per_pair: instructions of all threads in the full loop, for each pair.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: int
    mma_sync: int
    tcgen05: int
    tma: int
    cp_async: int
    full: Loop | None
    masked: Loop | None
    per_pair: float | None


def compile_kernel(
    name: str,
    architecture: int,
    head_dim: int,
    itemsize: int,
    *,
    value_dim: int = 0,
    softcap: float | None = None,
    shapes: Shapes | None = None,
    forms: TritonOptions = DEFAULT,
    parts: int = 1,
) -> Any:
    """One of :data:`KERNELS` as a device would compile it: pointers are multiples of 16, which
    decides whether loads are asynchronous."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    value_dim = value_dim or head_dim
    atomic, code = name == "atomic_key_gradient", name.removeprefix("atomic_")
    shapes = shapes or _shapes(architecture, max(head_dim, value_dim), itemsize)
    options = Options(head_dim, 1.0, softcap, deterministic=not atomic)
    constants = constants_of(code, head_dim, value_dim, shapes, options, forms)
    if code == "key_gradient":
        constants["PARTS"] = parts
    settings = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    kernel = kernel_code(f"{code}_kernel")
    types = dict.fromkeys(("q", "kv", "grad_out"), _ELEMENTS[itemsize]) | {"table": "*i32"}
    types |= dict.fromkeys(("out", "lse", "delta", "grad_q", "grad_kv", "sums"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    pointers = [n for n, type_ in enumerate(signature.values()) if type_.startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(each),): value for each, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=settings)


def shape_of(name: str, architecture: int, head_dim: int, itemsize: int) -> Shape:
    """The tile that the kernel takes there."""
    shape: Shape = getattr(_shapes(architecture, head_dim, itemsize), name)
    return shape


def _shapes(architecture: int, widest: int, itemsize: int) -> Shapes:
    small = {89: 86, 120: 86}
    return SHAPES[small.get(architecture, architecture), max(64, padded(widest)), itemsize]


def figures(compiled: Any, shape: Shape) -> Figures:
    """What :func:`compile_kernel` made, with tiles of ``shape``."""
    code, usage = _disassembled(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    loops = _loops(code)
    full = loops[0] if loops else None
    threads, pairs = 32 * shape.warps, shape.outer * shape.inner
    return Figures(
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        tcgen05=ptx.count("tcgen05.mma"),
        tma=ptx.count("cp.async.bulk.tensor"),
        cp_async=len(re.findall(r"cp\.async\.c[ag]\b", ptx)),
        full=full,
        masked=loops[1] if len(loops) > 1 else None,
        per_pair=round(full.instructions * threads / pairs, 2) if full else None,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"cuobjdump's usage has no {pattern}"
    return int(found[1])


def _disassembled(cubin: bytes) -> tuple[list[tuple[int, str]], str]:
    """(address, instruction) of the code, and the line of what it uses."""
    from triton import knobs

    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        code, usage = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, option, str(path)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    return [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)], usage


def _loops(code: list[tuple[int, str]]) -> list[Loop]:
    """The innermost loops with the most matrix products, in the code's order: full tiles, masked
    ones. Waits behind the code that jump back into it enclose fewer."""
    place = {at: index for index, (at, _) in enumerate(code)}
    spans = []
    for index, (at, text) in enumerate(code):
        jump = _JUMP.search(text)
        if jump and (target := int(jump[1], 16)) <= at and target in place:
            spans.append((place[target], index + 1))
    found = []
    for first, end in sorted(spans):
        lines = [text for _, text in code[first:end]]
        if products := sum(bool(_PRODUCT.search(line)) for line in lines):
            spills = sum(bool(_LOCAL.search(line)) for line in lines)
            found.append((first, end, products, Loop(end - first, spills)))
    inner = [
        one for one in found
        if not any(o is not one and one[0] <= o[0] and o[1] <= one[1] for o in found)
    ]  # fmt: skip
    most = max((products for *_, products, _ in inner), default=0)
    return [loop for *_, products, loop in inner if products == most]
