"""Flash attention as a kernel: waves pair by pair, and the kernel on a stand-in.

The operators exist on CUDA devices only. The stand-in keeps their documented contract on the CPU,
by dense attention sequence by sequence: it shows what is handed to them and what becomes of it.
"""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp import AttentionSpec, Cluster, LocalWorld, SequenceBatch, plan
from dcp.runtime.division import attention_steps, merged_slices
from dcp.runtime.kernels import Options, flash, get_kernel
from dcp.runtime.waves import division_waves, program_waves
from dcp.slices import K1, Q1
from tests.kernel_cases import NAMES, count_pairs, errors, make_plan, make_spec
from tests.masks_cases import MASKS

CPU = torch.device("cpu")


# --------------------------------------------------------------------------- waves


def pairs_of_wave(window, slices, sizes):
    """How often the kernel's contract computes each pair of a wave's sequences."""
    left, right = window
    pairs = np.zeros(sizes, dtype=int)
    for q0, q1, k0, k1, *_ in slices.tolist():
        place = np.arange(k1 - k0)[None] - np.arange(q1 - q0)[:, None] - (k1 - k0) + (q1 - q0)
        seen = np.ones(place.shape, dtype=bool)
        if right >= 0:
            seen &= place <= right
        if left >= 0:
            seen &= place >= -left
        pairs[q0:q1, k0:k1] += seen
        assert seen.any(axis=1).all()  # a row that sees nothing has no log-sum-exp
    return pairs


def is_disjoint(runs):
    runs = runs[np.argsort(runs[:, 0])]
    return (runs[:-1, 1] <= runs[1:, 0]).all()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_waves_hold_every_pair_once(mask, world):
    a_plan = make_plan(mask, world)
    for rank in range(world):
        program = a_plan.rank_plan(rank).mask_program()
        waves = program_waves(program)
        for step in attention_steps(program):
            some, rest = waves[step.step]
            wanted = merged_slices(step.items, program.slices)
            left = merged_slices(rest, program.slices)
            sizes = wanted[:, [Q1, K1]].max(axis=0, initial=0)
            found = sum((pairs_of_wave(w.window, w.slices, sizes) for w in some), np.zeros(sizes))
            assert (found + count_pairs(left, sizes) == count_pairs(wanted, sizes)).all()
            for wave in some:
                assert is_disjoint(wave.slices[:, [0, 1]] + wave.slices[:, [6]])
                assert is_disjoint(wave.slices[:, [2, 3]] + wave.slices[:, [7]])


numbers = st.integers(0, 12)
slices = st.builds(
    lambda q, m, k, n, lo, width: [q, q + m, k, k + n, lo, lo + width, 100, 200],
    numbers, numbers, numbers, numbers, st.integers(-14, 14), numbers,
)  # fmt: skip


@given(st.lists(slices, max_size=6).map(lambda s: np.array(s, dtype=np.int64).reshape(-1, 8)))
def test_any_slices_make_waves(bands):
    wanted = count_pairs(bands, (24, 24))
    found = np.zeros((24, 24))
    for window, some in division_waves(bands):
        found += pairs_of_wave(window, some, (24, 24))
        assert is_disjoint(some[:, [0, 1]])
        assert is_disjoint(some[:, [2, 3]])
    assert (found == wanted).all()


def test_documents_of_one_division_are_one_call():
    batch = SequenceBatch([300, 200, 77], "causal")
    cluster = Cluster(num_nodes=1, devices_per_node=1)
    program = plan(batch, make_spec(), cluster).rank_plan(0).mask_program()
    [(waves, rest)] = program_waves(program).values()
    assert [(wave.window, len(wave.slices), wave.first) for wave in waves] == [((-1, 0), 3, True)]
    assert not len(rest)


# --------------------------------------------------------------------------- the kernel


class OnCpu(flash.FlashKernel):
    """The kernel where the stand-in is."""

    def refusal(self, device, dtype, options):
        return flash._unserved(dtype, options)


def sequences(ends_q, ends_k, left, right):
    """Rows of each sequence and its mask, as the operators' documentation has it."""
    for q0, q1, k0, k1 in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        diagonal = torch.arange(k1 - k0)[None] - torch.arange(q1 - q0)[:, None]
        diagonal = diagonal - ((k1 - k0) - (q1 - q0))
        mask = torch.ones_like(diagonal, dtype=torch.bool)
        mask &= (diagonal <= right) if right >= 0 else True
        mask &= (diagonal >= -left) if left >= 0 else True
        yield slice(q0, q1), slice(k0, k1), mask


def scores(q, k, mask, scale):
    wide = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    found = torch.einsum("qhd,khd->hqk", q.float(), wide) * scale
    return found.masked_fill(~mask, -torch.inf)


def forward(
    q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, debug,
    *, scale, window_size_left, window_size_right, **_,
):  # fmt: skip
    assert longest_q == ends_q.diff().max()
    assert longest_k == ends_k.diff().max()
    assert causal == ((window_size_left, window_size_right) == (-1, 0))
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), torch.inf)
    ends = ends_q.tolist(), ends_k.tolist()
    for rows, keys, mask in sequences(*ends, window_size_left, window_size_right):
        s = scores(q[rows], k[keys], mask, scale)
        wide = v[keys].float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(dim=-1), wide).to(q.dtype)
        lse[:, rows] = s.logsumexp(dim=-1)
    none = torch.empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), none, none


def backward(
    grad_out, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, dropout, causal,
    rng_state, unused, *, scale, window_size_left, window_size_right,
):  # fmt: skip
    assert lse.is_contiguous()
    assert torch.are_deterministic_algorithms_enabled()
    ratio = q.shape[1] // k.shape[1]
    delta = (grad_out.float() * out.float()).sum(dim=-1).T[..., None]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    ends = ends_q.tolist(), ends_k.tolist()
    for rows, keys, mask in sequences(*ends, window_size_left, window_size_right):
        p = (scores(q[rows], k[keys], mask, scale) - lse[:, rows, None]).exp()
        wide_k, wide_v = (x[keys].float().repeat_interleave(ratio, dim=1) for x in (k, v))
        dp = torch.einsum("qhd,khd->hqk", grad_out[rows].float(), wide_v)
        ds = p * (dp - delta[:, rows]) * scale
        dq = torch.einsum("hqk,khd->qhd", ds, wide_k)
        dk = torch.einsum("hqk,qhd->khd", ds, q[rows].float())
        dv = torch.einsum("hqk,qhd->khd", p, grad_out[rows].float())
        grads[0][rows] = dq.to(q.dtype)
        for grad, of in ((grads[1], dk), (grads[2], dv)):
            grad[keys] = of.unflatten(1, (-1, ratio)).sum(dim=2).to(q.dtype)
    return tuple(grads)


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    yield
    library._destroy()


def is_near(found):
    """Errors at most two and a half times those of dense attention in the same dtype."""
    ours, theirs = found
    for name, our, their in zip(NAMES, ours, theirs, strict=False):
        assert our <= 2.5 * their + 1e-3, (name, our, their)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_equals_dense(mask, world):
    is_near(errors(OnCpu(), mask, world, dtype="bfloat16"))


@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (6, 3)])
@pytest.mark.parametrize("call", [{}, {"scale": 0.3}, {"with_sink": True}], ids=str)
def test_head_groups_and_options(heads, call):
    is_near(errors(OnCpu(), "streaming", 2, heads, dtype="float16", **call))


def _with_tiles(mask):
    """Errors where items of many slices go to the Triton kernel, whose interpreter has this
    process; and how many went."""
    sent = []

    class Counting(OnCpu):
        def prepare(self, program, *args, **options):
            works = super().prepare(program, *args, **options)
            sent.extend(work for work in works.values() if work.rest is not None)
            return works

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    return errors(Counting(), mask, 2, (2, 1), dtype="bfloat16"), len(sent)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_items_of_many_slices_go_to_tiles(interpreter):
    found, sent = interpreter(_with_tiles, "ranges")
    is_near(found)
    assert sent


def test_values_of_another_width():
    batch = SequenceBatch([40, 25], "causal")
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=24, value_dim=16, dtype="bfloat16")
    cluster = Cluster(num_nodes=1, devices_per_node=2)
    a_plan = plan(batch, spec, cluster, strategy="zigzag")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(65, heads, width, generator=generator, dtype=torch.bfloat16)
        for heads, width in ((4, 24), (2, 24), (2, 16))
    )
    found = LocalWorld(a_plan, kernel=OnCpu()).attention(q, k, v)
    wanted = LocalWorld(a_plan, kernel="dense").attention(q, k, v)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float32, {}, "it has no torch.float32"),
        (torch.bfloat16, {"softcap": 2.0}, "no soft-cap"),
        (torch.bfloat16, {"head_dim": 260}, "multiples of 8 up to 256, not 260"),
        (torch.bfloat16, {"head_dim": 20}, "multiples of 8 up to 256, not 20"),
    ],
)
def test_what_the_operators_do_not_serve_is_refused(dtype, options, reason):
    call = Options(**{"head_dim": 64, "scale": 1.0, **options})
    with pytest.raises(ValueError, match=reason):
        get_kernel(OnCpu(), CPU, dtype, call)
    with pytest.raises(ValueError, match="flash: it runs on CUDA devices only"):
        get_kernel("flash", CPU, dtype, call)
