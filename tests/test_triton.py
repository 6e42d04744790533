"""The Triton kernels, in Triton's interpreter, against dense attention in float64.

The interpreter is chosen by Triton's own environment variable before Triton is imported, so the
cases run in a process of their own.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch

from dcp import AttentionSpec, AttnMask, Cluster, LocalWorld, SequenceBatch, plan
from dcp.bench.compiled import BEGIN, END
from dcp.runtime.kernels import Options, get_kernel
from dcp.runtime.kernels.triton_compile import compile_kernel, figures, shape_of
from dcp.runtime.kernels.triton_options import TritonOptions
from dcp.runtime.kernels.triton_shapes import SHARED_BYTES, Shape, Shapes
from tests.kernel_cases import (
    NAMES,
    SEQLENS,
    attend,
    count_pairs,
    difference,
    errors,
    inputs_of,
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


def errors_of(forms, *args, **call):
    """Of the kernel in a form of its own."""
    from dcp.runtime.kernels.triton import TritonKernel

    return errors(TritonKernel(forms), *args, **call)


@pytest.mark.parametrize("mask", ["causal", "streaming", "shared_question"])
@pytest.mark.parametrize(
    "forms",
    [
        TritonOptions(pack_heads=2),
        TritonOptions(key_programs=1000),
        TritonOptions(descriptors=True),
        TritonOptions(pack_heads=4, key_programs=20, descriptors=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_forms(interpreter, forms, mask, deterministic):
    heads = (8, 2) if forms.pack_heads == 4 else (4, 2)
    is_close(interpreter(errors_of, forms, mask, 2, heads, deterministic=deterministic))


def test_forms_with_values_of_another_width(interpreter):
    found = interpreter(forms_with_narrow_values)
    assert max(found) <= 1e-5, found


def forms_with_narrow_values():
    from dcp.runtime.kernels.triton import TritonKernel

    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=24, value_dim=16, dtype="float32")
    batch = SequenceBatch(SEQLENS)
    a_plan = plan(batch, spec, Cluster(devices_per_node=1), strategy="bisection", block_size=24)
    shapes = [(batch.num_tokens, *each) for each in ((4, 24), (2, 24), (2, 16))]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    kernel = TritonKernel(TritonOptions(pack_heads=2, key_programs=1000, descriptors=True))
    world = LocalWorld(a_plan, kernel=kernel)

    def attention(q, k, v, _sink):
        return world.attention(q, k, v, return_lse=True)

    found = attend(attention, q, k, v, None)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = attend(lambda *x: dense_attention(*x[:3], batch_mask(batch)), *exact, None)
    return [difference(a, b) for a, b in zip(found, want, strict=True)]


def test_forms_that_cannot_be_are_refused(interpreter):
    with pytest.raises(ValueError, match="pack_heads must be 1, 2, 4, 8 or 16, got 3"):
        TritonOptions(pack_heads=3)
    with pytest.raises(ValueError, match="pack_heads=4 does not divide 2 heads a KV head"):
        interpreter(errors_of, TritonOptions(pack_heads=4), "causal", 1, (4, 2))
    with pytest.raises(ValueError, match="cannot share a table"):
        Shapes.parse("64 64 4 1, 32 64 4 1, 64 64 4 1, 64 64 4 1")


def not_finite(name):
    """Which rows of a causal mask's results are NaN, once one number of one input is."""
    spec = make_spec(2, 2)
    a_plan = plan(SequenceBatch([100]), spec, Cluster(devices_per_node=1), block_size=100)
    tensors = dict(zip("qkv", inputs_of(spec, 100, torch.float32, False), strict=False))
    tensors[name].data[60, 1, 3] = float("nan")
    world = LocalWorld(a_plan, kernel="triton")

    def attention(q, k, v, _sink):
        return world.attention(q, k, v, return_lse=True)

    found = attend(attention, *tensors.values(), None)
    return [x.flatten(2).isnan().any(2) if x.dim() == 3 else x.isnan() for x in found]


@pytest.mark.parametrize("name", "qkv")
def test_a_number_that_is_not_finite_stays_with_those_who_see_it(interpreter, name):
    out, lse, dq, dk, dv = interpreter(not_finite, name)
    assert not any(found[:, 0].any() for found in (out, lse, dq, dk, dv)), "of the other head"
    queries = torch.arange(100) == 60 if name == "q" else torch.arange(100) >= 60
    assert torch.equal(out[:, 1], queries)
    assert torch.equal(dq[:, 1], queries)
    keys = torch.arange(100) <= 60 if name == "q" else torch.ones(100, dtype=torch.bool)
    assert torch.equal(dk[:, 1], keys)
    if name != "v":  # a value's NaN may reach the lse of those whose output it makes NaN
        assert torch.equal(lse[:, 1], queries)
        assert torch.equal(dv[:, 1], keys)


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
    from dcp.runtime.kernels.triton import division_tables

    shapes = Shapes.alike(Shape(outer, inner, 4, 1))
    batch = SequenceBatch(SEQLENS, [MASKS[mask](n) for n in SEQLENS])
    cluster = Cluster(num_nodes=1, devices_per_node=world)
    a_plan = plan(batch, make_spec(), cluster, strategy="hypergraph", block_size=24)
    for rank in range(world):
        program = a_plan.rank_plan(rank).mask_program()
        steps = attention_steps(program)
        tables = division_tables([step.items for step in steps], program.slices, shapes)
        sizes = program.buffer_rows[:2] + inner
        for index, step in enumerate(steps):
            want = count_pairs(row_slices(step.items, program.slices), sizes)
            for table, pairs in zip(tables, (want, want.T), strict=True):
                found = np.zeros_like(pairs)
                first, end = table.tile_start[index : index + 2]
                for row, rows, _, entry, masked, end_entry, *_ in table.tiles[first:end].tolist():
                    for at, tiles, *_ in table.entries[entry:masked].tolist():
                        found[row : row + rows, at : at + tiles * inner] += 1
                    for at, *band in table.entries[masked:end_entry].tolist():
                        box = (slice(row, row + rows), slice(at, at + inner))
                        one = count_pairs([band], pairs.shape)[box]
                        seen = np.arange(at, at + one.shape[1])
                        assert (one.any(0) == ((seen >= band[2]) & (seen < band[3]))).all()
                        found[box] += one
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
    assert table.entries[:, :2].tolist() == [[512, 8]] * 2
    assert (table.tiles[:, 4] == table.tiles[:, 5]).all()


def test_longest_work_comes_first():
    from dcp.runtime.kernels.tile_table import build_table, by_query

    bands = np.concatenate([AttnMask.causal(512).bands, np.zeros((1, 2), dtype=np.int64)], axis=1)
    none = np.zeros(1, dtype=np.int64)
    runs = [(none, none, np.array([512]))]
    table = build_table(none, *by_query(bands), runs, outer=128, inner=64)
    assert table.tiles[:, 0].tolist() == [384, 256, 128, 0]


KINDS = ["forward", "query_gradient", "key_gradient", "atomic_key_gradient"]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", KINDS)
def test_the_kernels_compile_for_gpus(name, arch):
    """The interpreter accepts what the compiler refuses; compiling needs no device. Widths that
    are no power of two, values of another width, a soft-cap."""
    compiled = compile_kernel(name, arch, 96, 2, value_dim=48, softcap=2.0)
    assert compiled.metadata.shared <= SHARED_BYTES[arch]


@pytest.mark.parametrize(
    ("arch", "product"), [(80, "mma_sync"), (90, "wgmma"), (100, "tcgen05")], ids=str
)
@pytest.mark.parametrize("name", KINDS)
def test_loads_are_asynchronous_and_products_on_tensor_cores(name, arch, product):
    found = figures(compile_kernel(name, arch, 128, 2), shape_of(name, arch, 128, 2))
    assert found.cp_async > 0
    assert getattr(found, product) > 0
    assert found.shared_bytes <= SHARED_BYTES[arch]
    if name != "atomic_key_gradient":
        assert found.full.spills == 0
        assert found.full.instructions < found.masked.instructions < 4 * found.full.instructions


def test_hopper_adds_query_gradients_by_its_own_products():
    found = figures(compile_kernel(KINDS[3], 90, 128, 2), shape_of(KINDS[3], 90, 128, 2))
    assert found.wgmma > 0
    assert found.mma_sync == 0


@pytest.mark.parametrize("name", KINDS)
def test_heads_fit_small_shared_memory(name):
    for head_dim, itemsize in ((128, 2), (256, 2), (256, 4)):
        compiled = compile_kernel(name, 89, head_dim, itemsize)
        assert compiled.metadata.shared <= SHARED_BYTES[86]


def test_without_an_interpreter_or_gpu_the_reason_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="triton: it runs on CUDA devices"):
        get_kernel("triton", torch.device("cpu"), torch.float32, Options(64, 1.0))
    with pytest.raises(ValueError, match=r"triton: it has no torch.float64"):
        get_kernel("triton", torch.device("cpu"), torch.float64, Options(64, 1.0))


def test_the_table_of_compiled_figures_is_written_between_its_marks(tmp_path, capsys):
    from dcp.cli import main

    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    one = ["--architectures", "90", "--head-dims", "64", "--forms", "default", "--write", str(page)]
    assert main(["bench", "compiled", "--json", *one]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["kernel"] for row in rows] == KINDS
    assert all(row["figures"]["wgmma"] for row in rows)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nbehind\n")
    assert "old" not in text
    assert "| 90 | 64 | forward | 128×128, 8, 2 |" in text
    page.write_text("no marks")
    assert main(["bench", "compiled", *one]) == 2
    assert "does not have the lines" in capsys.readouterr().err
