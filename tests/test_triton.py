"""The Triton kernels, in Triton's interpreter, against dense attention in float64.

The interpreter is chosen by Triton's own environment variable before Triton is imported, so the
cases run in a process of their own.
"""

import importlib.util

import numpy as np
import pytest
import torch

from dcp import AttnMask, Cluster, LocalWorld, SequenceBatch, plan
from dcp.runtime.kernels import Options, get_kernel
from tests.kernel_cases import (
    NAMES,
    SEQLENS,
    attend,
    count_pairs,
    difference,
    errors,
    is_close,
    make_spec,
)
from tests.masks_cases import MASKS
from tests.oracle import batch_mask, dense_attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_equals_dense(interpreter, mask):
    """Rows that see nothing (ranges, slices) and lengths that are no multiple of a tile too."""
    is_close(interpreter(errors, "triton", mask, 2, (2, 1)))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_head_dimensions(interpreter, head_dim):
    is_close(interpreter(errors, "triton", "streaming", 1, (2, 1), head_dim))


@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (6, 3)])
def test_head_groups(interpreter, heads):
    is_close(interpreter(errors, "triton", "causal", 3, heads))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_at_most_twice_as_much_as_dense(interpreter, dtype):
    ours, theirs = interpreter(errors, "triton", "prefix_lm", 2, dtype=dtype)
    for name, our, their in zip(NAMES, ours, theirs, strict=False):
        assert our <= 2 * their, (name, our, their)


@pytest.mark.parametrize(
    "call",
    [
        {"scale": 0.3},
        {"softcap": 2.0},
        {"with_sink": True},
        {"softcap": 5.0, "with_sink": True, "scale": 0.5},
        {"deterministic": False},
    ],
    ids=str,
)
def test_options(interpreter, call):
    is_close(interpreter(errors, "triton", "streaming", 2, **call))


def results(deterministic=True):
    """As bytes: results of inputs that are not contiguous, on two ranks."""
    batch = SequenceBatch(SEQLENS)
    cluster = Cluster(num_nodes=1, devices_per_node=2)
    a_plan = plan(batch, make_spec(), cluster, block_size=24)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(16, 8, batch.num_tokens, generator=generator).permute(2, 1, 0)
    q, k, v = (x.requires_grad_() for x in (packed[:, :4], packed[:, 4:6], packed[:, 6:]))
    world = LocalWorld(a_plan, kernel="triton")

    def attention(q, k, v, sink):
        return world.attention(q, k, v, return_lse=True, deterministic=deterministic)

    found = attend(attention, q, k, v, None)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = attend(lambda *x: dense_attention(*x[:3], batch_mask(batch)), *exact, None)
    worst = max(difference(a, b) for a, b in zip(found, want, strict=True))
    return worst, b"".join(x.numpy().tobytes() for x in found)


def test_non_contiguous_inputs_and_equal_bits_in_two_runs(interpreter):
    (worst, bits), (_, again) = interpreter(results), interpreter(results)
    assert worst <= 1e-5
    assert bits == again


def tables_against_slices(mask, world, outer, inner):
    """The tables name every pair of a division once."""
    from dcp.runtime.division import attention_steps, row_slices
    from dcp.runtime.kernels.triton import Shape, Shapes, division_tables

    shape = Shape(outer, inner, 4, 1)
    batch = SequenceBatch(SEQLENS, [MASKS[mask](n) for n in SEQLENS])
    cluster = Cluster(num_nodes=1, devices_per_node=world)
    a_plan = plan(batch, make_spec(), cluster, strategy="hypergraph", block_size=24)
    for rank in range(world):
        program = a_plan.rank_plan(rank).mask_program()
        steps = attention_steps(program)
        tables = division_tables(
            [step.items for step in steps], program.slices, Shapes(shape, shape, shape)
        )
        sizes = program.buffer_rows[:2] + inner
        for index, step in enumerate(steps):
            want = count_pairs(row_slices(step.items, program.slices), sizes)
            for table, pairs in zip(tables, (want, want.T), strict=True):
                found = np.zeros_like(pairs)
                first, end = table.tile_start[index : index + 2]
                for row, rows, _, entry, masked, end_entry, *_ in table.tiles[first:end].tolist():
                    assert not table.entries[entry:masked, 3].any()
                    assert table.entries[masked:end_entry, 3].all()
                    for at, tiles, band, bands, *_ in table.entries[entry:end_entry].tolist():
                        box = (slice(row, row + rows), slice(at, at + tiles * inner))
                        if bands:
                            cut = table.bands[band : band + bands]
                            found[box] += count_pairs(cut, pairs.shape)[box] > 0
                        else:
                            found[box] += 1
                assert (found == pairs).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("world", [1, 3])
def test_tables_hold_every_pair_once(mask, world):
    tables_against_slices(mask, world, 32, 16)


def test_a_full_rectangle_takes_no_mask_and_an_empty_one_no_visit():
    from dcp.runtime.kernels.tile_table import build_table

    none = np.zeros(1, dtype=np.int64)
    bands = np.array([[0, 256, 512, 1024, -10000, 10000]])
    runs = [(none, none, np.array([1024]))]
    table = build_table(none, bands, none, runs, outer=128, inner=64)
    assert table.tiles[:, 0].tolist() == [0, 128]  # rows from 256 on see nothing
    assert table.entries[:, :4].tolist() == [[512, 8, 0, 0]] * 2
    assert len(table.bands) == 0


def test_longest_work_comes_first():
    from dcp.runtime.kernels.tile_table import build_table, by_query

    bands = np.concatenate([AttnMask.causal(512).bands, np.zeros((1, 2), dtype=np.int64)], axis=1)
    none = np.zeros(1, dtype=np.int64)
    runs = [(none, none, np.array([512]))]
    table = build_table(none, *by_query(bands), runs, outer=128, inner=64)
    assert table.tiles[:, 0].tolist() == [384, 256, 128, 0]


def compile_kernel(name, arch, width, itemsize, *, atomic, ragged=False):
    """One kernel as the device would compile it: pointers and counts of aligned tensors are
    multiples of 16, which decides whether loads are asynchronous. ``ragged``: widths that are no
    power of two; values of another width, but for 8.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dcp.runtime.kernels import triton_code
    from dcp.runtime.kernels.triton import shapes_for

    kernel = getattr(triton_code, f"{name}_kernel")
    shape = getattr(shapes_for(width, itemsize, small=arch in SMALL), name)
    value_width = width // 2 if ragged and arch != 80 else width
    constants = {
        "HEAD_DIM": width - 32 if ragged else width,
        "D": width,
        "VALUE_DIM": value_width - 32 if ragged and arch == 80 else value_width,
        "DV": value_width,
        "OUTER": shape.outer,
        "INNER": shape.inner,
        "SOFTCAP": ragged,
        "UPCAST": False,
        "ATOMIC": atomic,
    }
    kind = {2: "*bf16", 4: "*fp32"}[itemsize]
    types = dict.fromkeys(("q", "kv", "grad_out"), kind) | {"table": "*i32"}
    types |= dict.fromkeys(("out", "lse", "delta", "grad_q", "grad_kv"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    signature = {arg: types.get(arg, "i32") for arg in names}
    return triton.compile(
        ASTSource(
            kernel,
            signature,
            {(names.index(arg),): value for arg, value in constants.items() if arg in names},
            {
                (index,): [["tt.divisibility", 16]]
                for index, arg in enumerate(names)
                if signature[arg].startswith("*")
            },
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages},
    )


KINDS = ["forward", "query_gradient", "key_gradient"]
SMALL = (86, 89, 120)  # capabilities whose shared memory is 99 KiB a block


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KINDS)
def test_the_kernels_compile_for_gpus(name, arch):
    """The interpreter accepts what the compiler refuses; compiling needs no device."""
    compiled = compile_kernel(name, arch, 128, 2, atomic=True, ragged=True)
    assert compiled.metadata.shared <= 163 * 1024, "more shared memory than an A100 has"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KINDS)
def test_loads_are_asynchronous_and_products_on_tensor_cores(name, arch):
    compiled = compile_kernel(name, arch, 128, 2, atomic=False)
    code = compiled.asm["ptx"]
    assert "cp.async" in code
    assert ("wgmma" if arch == 90 else "mma.sync") in code
    assert compiled.metadata.shared <= 163 * 1024


@pytest.mark.parametrize("name", KINDS)
def test_wide_heads_fit_small_shared_memory(name):
    for itemsize in (2, 4):
        compiled = compile_kernel(name, 89, 256, itemsize, atomic=True)
        assert compiled.metadata.shared <= 99 * 1024


def test_without_an_interpreter_or_gpu_the_reason_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="triton: it runs on CUDA devices"):
        get_kernel("triton", torch.device("cpu"), torch.float32, Options(64, 1.0))
    with pytest.raises(ValueError, match=r"triton: it has no torch.float64"):
        get_kernel("triton", torch.device("cpu"), torch.float64, Options(64, 1.0))
