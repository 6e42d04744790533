"""A kernel is tried on a small case before it is trusted."""

import logging

import pytest
import torch

from dcp.runtime import kernels
from dcp.runtime.kernels import Options, get_kernel, torch_cpu
from dcp.runtime.kernels.trial import trial
from dcp.runtime.reference import dense_attention, relative_error

CPU = torch.device("cpu")
CALLS = [
    (torch.float64, Options(16, 0.25)),
    (torch.float32, Options(32, 0.3, value_dim=16)),
    (torch.bfloat16, Options(64, 0.125, needs_grad=False)),
    (torch.float16, Options(24, 0.2)),
]


@pytest.mark.parametrize("name", ["torch_cpu", "dense"])
@pytest.mark.parametrize(("dtype", "options"), CALLS, ids=str)
def test_kernels_pass(name, dtype, options):
    assert trial(get_kernel(name, CPU, dtype, options), CPU, dtype, options) is None


def test_a_soft_cap_is_tried():
    options = Options(16, 0.25, softcap=1.5)
    assert (
        trial(get_kernel("dense", CPU, torch.float32, options), CPU, torch.float32, options) is None
    )


class Careless(torch_cpu.TorchCpuKernel):
    """Forgets the last row of every gradient."""

    def gradients(self, *args):
        dq, dk, dv = super().gradients(*args)
        return dq, dk.index_fill(0, torch.tensor([-1 % len(dk)]), 0.0), dv


class Plain(torch_cpu.TorchCpuKernel):
    """Reads rows one behind the other, as kernels may that take pointers."""

    def backward(self, work, q_side, kv, *rest):
        assert all(tensor.is_contiguous() for tensor in (*q_side, kv))
        super().backward(work, q_side, kv, *rest)


def test_what_a_kernel_is_given_is_contiguous():
    assert trial(Plain(), CPU, torch.float32, Options(16, 0.25)) is None


def test_a_wrong_kernel_is_passed_over_loudly(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(torch_cpu, "KERNEL", Careless())
    get_kernel.cache_clear()
    try:
        with caplog.at_level(logging.ERROR, "dcp"):
            kernel = get_kernel("auto", CPU, torch.float32, Options(16, 0.25))
        assert kernel.name == "dense"
        assert (
            "kernel torch_cpu is not used for torch.float32 on cpu: its dk is off by" in caplog.text
        )
        forward = get_kernel("auto", CPU, torch.float32, Options(16, 0.25, needs_grad=False))
        assert forward.name == "torch_cpu"
    finally:
        get_kernel.cache_clear()


def test_a_kernel_that_fails_is_passed_over(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(kernels, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(Careless, "attend", fail, raising=False)
    monkeypatch.setattr(torch_cpu, "KERNEL", Careless())
    get_kernel.cache_clear()
    try:
        assert get_kernel("auto", CPU, torch.float32, Options(16, 0.25)).name == "dense"
        assert "it fails on a small case: RuntimeError: illegal instruction" in caplog.text
    finally:
        get_kernel.cache_clear()


def test_dense_attention_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(20, 4, 16, generator=generator)
    k, v = (torch.randn(20, 2, 16, generator=generator) for _ in range(2))
    seen = torch.rand(20, 20, generator=generator) < 0.5
    seen[3] = False
    out, lse = dense_attention(q, k, v, seen, scale=0.3, softcap=2.0)
    for row, head in ((0, 0), (12, 1), (19, 3)):  # heads 2 and 3 share KV head 1
        keys = seen[row].nonzero().flatten()
        scores = 2 * torch.tanh(k[keys, head // 2] @ q[row, head] * 0.3 / 2)
        torch.testing.assert_close(out[row, head], scores.softmax(0) @ v[keys, head // 2])
        torch.testing.assert_close(lse[row, head], scores.exp().sum().log())
    assert not out[3].any()
    assert (lse[3] == -torch.inf).all()
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")
