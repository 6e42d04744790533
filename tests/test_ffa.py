"""MagiAttention's function as a kernel: slices of its kinds pair by pair, and the kernel on a
stand-in.

The function exists on GPUs only. The stand-in keeps its documented contract on the CPU, by dense
attention: it shows what is handed to it and what becomes of it.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp import LocalWorld
from dcp.runtime.kernels import Options, ffa, get_kernel
from tests.kernel_cases import SEQLENS, count_pairs, make_plan
from tests.masks_cases import MASKS
from tests.oracle import dense_attention

CPU = torch.device("cpu")


def kind_mask(rows, keys, kind):
    """Which pairs of a range count, as the function's documentation draws them."""
    i, j = torch.arange(rows)[:, None], torch.arange(keys)[None]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if kind in (1, 3):  # bottom-right aligned
        seen &= j - keys <= i - rows
    if kind in (2, 3):  # top-left aligned
        seen &= j >= i
    return seen


numbers = st.integers(0, 12)
bands = st.builds(
    lambda q, m, k, n, lo, width: [q, q + m, k, k + n, lo, lo + width, 100, 200],
    numbers, numbers, numbers, numbers, st.integers(-14, 14), numbers,
)  # fmt: skip


@given(st.lists(bands, max_size=6).map(lambda s: np.array(s, dtype=np.int64).reshape(-1, 8)))
def test_any_slices_are_of_four_kinds(slices):
    found = np.zeros((24, 24), dtype=int)
    for (q0, q1, k0, k1, *_), kind in zip(*map(list, ffa.of_four_kinds(slices)), strict=True):
        seen = kind_mask(q1 - q0, k1 - k0, kind)
        assert seen.any(dim=1).all()  # a row that sees nothing has no log-sum-exp
        found[q0:q1, k0:k1] += seen.numpy()
    assert (found == count_pairs(slices, (24, 24))).all()


def flex_flash_attn_func(
    q, k, v, q_ranges, k_ranges, attn_type_map=None, softmax_scale=None, softcap=0.0,
    deterministic=False, return_max_logits=False,
):  # fmt: skip
    assert q_ranges.dtype == k_ranges.dtype == attn_type_map.dtype == torch.int32
    assert len(q_ranges) == len(k_ranges) == len(attn_type_map)
    seen = torch.zeros(len(q), len(k), dtype=torch.int64)
    for (q0, q1), (k0, k1), kind in zip(
        q_ranges.tolist(), k_ranges.tolist(), attn_type_map.tolist(), strict=True
    ):
        seen[q0:q1, k0:k1] += kind_mask(q1 - q0, k1 - k0, kind)
    assert seen.max() <= 1
    out, lse = dense_attention(
        q.float(), k.float(), v.float(), seen.bool(), scale=softmax_scale, softcap=softcap or None
    )
    return out.to(q.dtype), SimpleNamespace(lse=lse.float(), max_logits=None)


class OnCpu(ffa.FfaKernel):
    """The kernel where the stand-in is."""

    def refusal(self, device, dtype, options):
        return ffa._unserved(dtype, options)


@pytest.fixture
def installed(monkeypatch):
    """As if a MagiAttention with the stand-in were there."""
    package, api = ModuleType("magi_attention"), ModuleType("magi_attention.api")
    package.__spec__, api.flex_flash_attn_func = SimpleNamespace(), flex_flash_attn_func
    monkeypatch.setitem(sys.modules, "magi_attention", package)
    monkeypatch.setitem(sys.modules, "magi_attention.api", api)
    ffa._function.cache_clear()
    yield
    ffa._function.cache_clear()
    get_kernel.cache_clear()


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("installed")
def test_every_mask_equals_dense(mask, world):
    a_plan = make_plan(mask, world)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(SEQLENS), heads, 16, generator=generator).to(torch.bfloat16)
        for heads in (4, 2, 2)
    )
    call = {"scale": 0.3, "softcap": 2.0} if world == 3 else {}
    out, lse = LocalWorld(a_plan, kernel=OnCpu()).attention(q, k, v, return_lse=True, **call)
    wanted = LocalWorld(a_plan, kernel="dense").attention(q, k, v, return_lse=True, **call)
    torch.testing.assert_close(out, wanted[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, wanted[1], atol=1e-4, rtol=1e-4)


OPTIONS = Options(head_dim=64, scale=1.0, needs_grad=False)


def test_where_it_is_absent_it_says_so():
    with pytest.raises(ValueError, match="ffa: MagiAttention is not installed"):
        get_kernel("ffa", CPU, torch.bfloat16, OPTIONS)


@pytest.mark.usefixtures("installed")
def test_it_is_refused_where_it_cannot_serve(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ffa.KERNEL.refusal(cuda, torch.bfloat16, OPTIONS) is None
    assert "Hopper" in ffa.KERNEL.refusal(CPU, torch.bfloat16, OPTIONS)
    for dtype, options, reason in (
        (torch.bfloat16, {"needs_grad": True}, "no backward pass of a part of the keys"),
        (torch.float32, {}, "it has no torch.float32"),
        (torch.bfloat16, {"value_dim": 32}, "no values of another width"),
        (torch.bfloat16, {"head_dim": 256}, "multiples of 8 up to 128, not 256"),
    ):
        call = Options(**{"head_dim": 64, "scale": 1.0, "needs_grad": False} | options)
        assert reason in ffa.KERNEL.refusal(cuda, dtype, call)
    older = sys.modules["magi_attention.api"]
    older.flex_flash_attn_func = lambda q, k, v, q_ranges, k_ranges, max_seqlen_q: None
    ffa._function.cache_clear()
    assert "older than 1.1" in ffa.KERNEL.refusal(cuda, torch.bfloat16, OPTIONS)
