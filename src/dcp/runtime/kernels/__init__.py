"""What an attention kernel is, and the registry of them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dcp.checks import one_of
from dcp.program import MaskProgram

# Modules of this folder, each with its ``KERNEL``, in the order in which "auto" asks them; the
# first two each serve one kind of device.
KERNELS = ("torch_cpu", "triton", "flash", "ffa", "flex", "dense")
# Devices on which "auto" tries a kernel on a small case first.
TRIED_ON = ("cuda",)

QSide = Sequence[Tensor]  # q, grad_out, lse, delta


@dataclass(frozen=True)
class Options:
    """What one call of attention asks of a kernel.

    Attributes:
        head_dim: numbers of a head's query or key.
        scale: of the scores.
        softcap: ``s -> softcap * tanh(s / softcap)`` on scaled scores; None for none.
        deterministic: two runs give equal bits; False lets a kernel add gradients in any order.
        needs_grad: the backward pass will be asked for.
        value_dim: numbers of a head's value or output; 0: as many as ``head_dim``.
    """

    head_dim: int
    scale: float
    softcap: float | None = None
    deterministic: bool = True
    needs_grad: bool = True
    value_dim: int = 0

    @property
    def widest(self) -> int:
        """Numbers of a key or a value, whichever has more."""
        return max(self.head_dim, self.value_dim)


class Kernel(ABC):
    """Runs the attention of one division, in place on a rank's buffers.

    Rows are of one head group: queries and their gradients ``[rows, heads, head_dim]``, outputs and
    theirs ``[rows, heads, value_dim]``, kv-like as :func:`split_kv` takes them, log-sum-exps and
    deltas ``[rows, heads]``.

    Attributes:
        name: in :data:`KERNELS`.
        writes_once: a division writes a result row at most once, so that the results of a
            program's only division may be of the tensors' dtype.
        by_name_on: types of devices on which ``"auto"`` leaves the kernel to those who name it.
    """

    name: str
    writes_once = False
    by_name_on: tuple[str, ...] = ()

    @abstractmethod
    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        """None, or why this kernel cannot serve."""

    def input_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What buffers of inputs hold: the tensors' own dtype."""
        return dtype

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What buffers of results hold: float32 for half precision, else the dtype itself."""
        return torch.float64 if dtype == torch.float64 else torch.float32

    @abstractmethod
    def prepare(
        self, program: MaskProgram, device: torch.device, *, widest: int, dtype: torch.dtype
    ) -> dict[int, Any]:
        """The work of each division by step, made once for all calls; see
        :attr:`Options.widest`."""

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        """sum(grad_out * out) of each row ``[rows, heads]``, in compute dtype."""
        dtype = self.compute_dtype(out.dtype)
        return (grad_out.to(dtype) * out.to(dtype)).sum(dim=-1)

    def merge(self, out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
        """Fold another partial result into ``out [rows, heads, value_dim]`` and ``lse [rows,
        heads]``, all contiguous and in compute dtype."""
        merge(out, lse, more_out, more_lse)

    @abstractmethod
    def forward(
        self, work: Any, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> None:
        """Fold the division's attention into the partial ``out`` and natural ``lse``."""

    @abstractmethod
    def backward(
        self,
        work: Any,
        q_side: QSide,
        kv: Tensor,
        grad_q: Tensor,
        grad_kv: Tensor,
        options: Options,
    ) -> None:
        """Add the division's gradients; ``q_side`` has the *global* log-sum-exp and delta."""


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Fold another partial result into ``out [rows, heads, d]`` and ``lse [rows, heads]``.

    Rows that see nothing in either part (lse = -inf in both) stay 0 and -inf.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = finite(total)
    out.mul_(torch.exp(lse - safe)[..., None])
    out.addcmul_(other_out, torch.exp(other_lse - safe)[..., None])
    lse.copy_(total)


def finite(lse: Tensor) -> Tensor:
    """Rows that see nothing get 0, so that exp(-inf - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


KV = Tensor | tuple[Tensor, Tensor]


def pack_kv(kv: KV) -> Tensor:
    """Keys and values in one tensor, whose rows can travel: packed ones as they are.

    A pair ``[keys, kv_heads, head_dim]``, ``[keys, kv_heads, value_dim]`` becomes ``[keys, 2,
    kv_heads, head_dim]``, or where the widths differ ``[keys, kv_heads, head_dim + value_dim]``.
    """
    if isinstance(kv, Tensor):
        return kv
    k, v = kv
    if k.shape[:-1] != v.shape[:-1] or (k.dtype, k.device) != (v.dtype, v.device):
        raise ValueError(
            f"keys are {tuple(k.shape)}, {k.dtype} on {k.device}, values {tuple(v.shape)}, "
            f"{v.dtype} on {v.device}: only their last dimension may differ"
        )
    same = k.shape[-1] == v.shape[-1]
    return torch.stack([k, v], dim=-3) if same else torch.cat([k, v], dim=-1)


def split_kv(kv: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views of keys and values ``[rows, kv_heads, …]``: inverse of :func:`pack_kv`."""
    if kv.dim() == 4:
        return kv[:, 0], kv[:, 1]
    return kv[..., :head_dim], kv[..., head_dim:]


@lru_cache(maxsize=256)
def get_kernel(
    name: str | Kernel, device: torch.device, dtype: torch.dtype, options: Options
) -> Kernel:
    """The kernel called ``name``, or with ``"auto"`` the first that serves; logged by name.

    On a GPU ``"auto"`` tries it on a small case first, once, and passes over one that is wrong.

    A :class:`Kernel` of one's own is taken as it is. Raises ``ValueError`` if there is none, with
    each one's reason.
    """
    if isinstance(name, Kernel):
        if (reason := name.refusal(device, dtype, options)) is not None:
            raise ValueError(f"kernel {name.name!r} cannot serve {dtype} on {device}: {reason}")
        return name
    one_of("kernel", name, ["auto", *KERNELS])
    reasons = []
    for candidate in KERNELS if name == "auto" else (name,):
        kernel: Kernel = import_module(f"dcp.runtime.kernels.{candidate}").KERNEL
        reason = kernel.refusal(device, dtype, options)
        if reason is None and name == "auto" and device.type in kernel.by_name_on:
            reason = f"on {device.type} it is taken by name only"
        if reason is None and name == "auto" and device.type in TRIED_ON:
            reason = _wrong(kernel, device, dtype, options)
        if reason is None:
            logging.getLogger("dcp").info("kernel %s for %s on %s", candidate, dtype, device)
            return kernel
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"no kernel for {dtype} on {device.type} ({'; '.join(reasons)})")


def _wrong(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, options: Options
) -> str | None:
    """None, or what is wrong with what the kernel computes there; logged as an error."""
    trial = import_module("dcp.runtime.kernels.trial").trial  # it plans, and so imports this
    try:
        reason: str | None = trial(kernel, device, dtype, options)
    except Exception as error:
        reason = f"it fails on a small case: {type(error).__name__}: {error}"
    if reason is not None:
        logging.getLogger("dcp").error(
            "kernel %s is not used for %s on %s: %s", kernel.name, dtype, device, reason
        )
    return reason
