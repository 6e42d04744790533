"""Attention kernels and the registry of them.

A kernel is a module that runs the attention of one division, in place on a rank's buffers:

- ``NAME``, and ``supports(device, dtype, options) -> str | None``: the reason why it cannot serve;
- ``WRITES_ONCE``: a division writes a result row at most once, so that the results of a program's
  only division may be of the tensors' dtype;
- ``input_dtype(dtype)`` and ``compute_dtype(dtype)``: what buffers of inputs and of results hold;
- ``prepare(program, device, head_dim=, dtype=)``: the work of each division by step, made once;
- ``delta(grad_out, out)``: sum(grad_out * out) of each row ``[rows, heads]``, in compute dtype;
- ``forward(work, q, kv, out, lse, options)``: folds the division's attention into the partial
  ``out [rows, heads, head_dim]`` and natural log-sum-exp ``lse [rows, heads]``;
- ``backward(work, q_side, kv, grad_q, grad_kv, options)``: adds the division's gradients;
  ``q_side`` is ``(q, grad_out, lse, delta)`` with the *global* lse and delta = sum(grad_out * out).

Rows are of one head group; ``kv`` and ``grad_kv`` are ``[rows, 2, kv_heads, head_dim]``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

# In the order in which "auto" asks; the first two each serve one kind of device.
KERNELS = ("torch_cpu", "triton", "flex", "dense")


@dataclass(frozen=True)
class Options:
    """What one call of attention asks of a kernel.

    Attributes:
        scale: of the scores.
        softcap: ``s -> softcap * tanh(s / softcap)`` on scaled scores; None for none.
        deterministic: two runs give equal bits; False lets a kernel add gradients in any order.
        needs_grad: the backward pass will be asked for.
    """

    scale: float
    softcap: float | None = None
    deterministic: bool = True
    needs_grad: bool = True


@lru_cache(maxsize=256)
def get_kernel(
    name: str, device: torch.device, dtype: torch.dtype, options: Options = Options(1.0)
) -> ModuleType:
    """The kernel called ``name``, or with ``"auto"`` the first that serves; logged by name.

    Raises ``ValueError`` if there is none, with each one's reason.
    """
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"kernel {name!r} is not one of auto, {', '.join(KERNELS)}")
    reasons = []
    for candidate in KERNELS if name == "auto" else (name,):
        kernel = import_module(f"dcp.runtime.kernels.{candidate}")
        reason = kernel.supports(device, dtype, options)
        if reason is None and name == "auto" and candidate == "triton" and device.type == "cpu":
            reason = "its interpreter is taken by name only"
        if reason is None:
            logging.getLogger("dcp").info("kernel %s for %s on %s", candidate, dtype, device)
            return kernel
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"no kernel for {dtype} on {device.type} ({'; '.join(reasons)})")
