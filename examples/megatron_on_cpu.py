"""Lets Megatron-Core run on CPU and gloo, for tests and for the example: it asks for CUDA at many
places that have nothing to do with attention. Not for training."""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _OnCpu(TorchFunctionMode):
    """Tensors that are asked for on ``cuda`` are made on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)  # optimizers look for these names
        return result


class _Stream:
    """A stream, or an event on one: whatever was asked for is done already."""

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> Any:
        return self

    def synchronize(self) -> None:
        pass


def run_on_cpu() -> None:
    """Replace, in this process, the parts of Megatron-Core that need CUDA; once is enough."""
    if torch.cuda.Stream.__name__ == _Stream.__name__:
        return
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention, torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    torch.compiler.set_stance("force_eager")  # or small functions start a C++ compiler
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.Stream = _Stream
    torch.cuda.current_stream = lambda *_: _Stream()
    torch.cuda.stream = lambda *_: contextlib.nullcontext()
    _OnCpu().__enter__()  # for the life of the process
    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # of recomputation
    random._set_cuda_rng_state = lambda *_, **__: None
    torch_norm.WrappedTorchNorm.__new__ = _norm  # its own refuses sequence parallelism
    multi_latent_attention.HAVE_TE = False  # 0.16.1 finds its own wrappers, which are empty
    moe_utils.te_general_gemm = None  # 0.16.1 defines it with Transformer Engine only
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host


def _on_host(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
    norm = torch.nn.RMSNorm(hidden_size, eps=eps)
    norm.weight.sequence_parallel = config.sequence_parallel
    return norm
