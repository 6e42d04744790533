"""The rows of ``dcp bench kernels`` that need a GPU: errors, speed beside torch's, programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import FlexKernelOptions

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench import rivals
from dcp.bench.alone import Alone, in_one_launch
from dcp.bench.rivals import host_medians
from dcp.cluster import Cluster
from dcp.masks import AttnMask, named_mask
from dcp.planner import plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, LocalWorld
from dcp.runtime.kernels import get_kernel
from dcp.runtime.kernels.device_clock import Works, device_medians
from dcp.runtime.reference import dense_attention, relative_error
from dcp.runtime.session import Call

SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
STRATEGY = "bisection"  # needs no partitioner: a GPU box may have torch, Triton and numba alone
PICK_TOKENS = 16384  # at which FlexAttention's settings and our tile shapes are picked
KERNELS = ("triton", "flash")  # ours, that are raced
Settings = list[FlexKernelOptions]


# --------------------------------------------------------------------------- errors


def error_ratio(
    dtype: str, head_dim: int, world: int, *, kernel: str = "triton", deterministic: bool = True
) -> tuple[float, str]:
    """Largest error of out, dq, dk, dv relative to attention in float64, over that of dense
    attention in the same dtype. With one rank results go straight into that dtype."""
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    seqlens = [700, 1, 1023, 300, 24]
    masks = [AttnMask.streaming(n, sink=16, window=100) for n in seqlens[:3]]
    masks += map(AttnMask.causal, seqlens[3:])
    batch = SequenceBatch(seqlens, masks)
    made = plan(batch, spec, Cluster(devices_per_node=world), strategy=STRATEGY)
    to, device = getattr(torch, dtype), torch.device("cuda")
    shapes = [(batch.num_tokens, heads, head_dim) for heads in (4, 2, 2, 4)]
    *tensors, grad = (torch.randn(shape, device=device, dtype=to) for shape in shapes)
    dense = torch.block_diag(*(torch.from_numpy(m.to_dense()) for m in masks)).bool()
    seen = dense.to(device)

    def results(attend: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    ranks = LocalWorld(made, kernel=kernel)
    attention = partial(ranks.attention, deterministic=deterministic)

    def by_the_book(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, seen)[0]

    exact = results(by_the_book, torch.float64)
    ours, theirs = (
        max(relative_error(a, b) for a, b in zip(results(attend, to), exact, strict=True))
        for attend in (attention, by_the_book)
    )
    return ours / theirs, f"relative errors {ours:.1e} against {theirs:.1e}"


# --------------------------------------------------------------------------- dense causal


def pick_settings(repeat: int) -> Settings:
    """FlexAttention's fastest settings, forward and backward, one causal sequence."""
    device = torch.device("cuda")
    best: dict[bool, tuple[float, FlexKernelOptions]] = {}
    blocks = rivals.PackedMask("causal", PICK_TOKENS, device).load([PICK_TOKENS]).blocks()
    for setting in rivals.flex_settings(SPEC.head_dim):
        torch.compiler.reset()
        try:
            works = both_ways(rivals.flex(blocks, setting), heads_first(PICK_TOKENS, device))
            for backward, work in works.items():
                seconds = device_medians({"flex": work}, repeat)["flex"]
                best[backward] = min(
                    best.get(backward, (seconds, setting)), (seconds, setting), key=_seconds
                )
        except Exception:  # settings that this device or version refuses
            continue
    found = [setting for _, setting in best.values()]
    return [s for n, s in enumerate(found) if s not in found[:n]] or [FlexKernelOptions()]


def _seconds(pair: tuple[float, FlexKernelOptions]) -> float:
    return pair[0]


def dense_ratios(
    tokens: int, settings: Settings, repeat: int
) -> dict[tuple[bool, str], tuple[float | None, str]]:
    """By (backward, rival): speed of our fastest kernel over the rival's best, one causal sequence;
    and of each of our kernels that could run, as the rival called by its name."""
    device = torch.device("cuda")
    found: dict[tuple[bool, str], tuple[float | None, str]] = {}
    blocks = rivals.PackedMask("causal", tokens, device).load([tokens]).blocks()
    tensors = heads_first(tokens, device)
    attends = {f"flex {n}": rivals.flex(blocks, each) for n, each in enumerate(settings)}
    attends["cudnn"] = rivals.fused(SDPBackend.CUDNN_ATTENTION)
    ours: dict[str, dict[bool, Callable[[], Any]]] = {}
    theirs: dict[str, dict[bool, Callable[[], Any]]] = {}
    refused: dict[str, str] = {}
    for kernel in KERNELS:
        try:
            attention = our_attention("causal", [tokens], device, kernel)
            ours[f"ours {kernel}"] = both_ways(attention, packed(tokens, device))
        except Exception as error:
            refused[kernel] = first_line(error)
    for name, attend in attends.items():
        try:
            theirs[name] = both_ways(attend, tensors)
        except Exception as error:  # one rival's refusal leaves the other
            refused[name.split()[0]] = first_line(error)
    if not ours:
        raise RuntimeError("; ".join(f"{kernel}: {refused[kernel]}" for kernel in KERNELS))
    for backward in (False, True):
        works = {name: each[backward] for name, each in (ours | theirs).items()}
        seconds = device_medians(works, repeat)
        best = min(value for name, value in seconds.items() if name in ours)
        flops = 2 * tokens**2 * SPEC.num_heads * SPEC.head_dim * (2.5 if backward else 1) / 1e12
        for rival in ("flex", "cudnn"):
            times = [value for name, value in seconds.items() if name.startswith(rival)]
            found[backward, rival] = None, refused.get(rival, "it could not run")
            if times:
                rate = f"{flops / best:.0f} against {flops / min(times):.0f} TFLOP/s"
                found[backward, rival] = min(times) / best, rate
        for kernel in KERNELS:
            found[backward, kernel] = None, refused.get(kernel, "it could not run")
            if (time := seconds.get(f"ours {kernel}")) is not None:
                found[backward, kernel] = flops / time, "TFLOP/s"
    return found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def both_ways(
    attend: Callable[..., Tensor], tensors: list[Tensor]
) -> dict[bool, Callable[[], Any]]:
    """Forward (as in training) and backward alone, by whether backward."""
    out = attend(*tensors)
    grad = torch.randn_like(out)
    return {
        False: lambda: attend(*tensors),
        True: lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True),
    }


# --------------------------------------------------------------------------- masks


def mask_ratios(
    mask: str, batches: list[list[int]], settings: Settings, repeat: int
) -> dict[bool, tuple[float, str]]:
    """Speed of ours over FlexAttention's, forward and backward, by whether the mask's preparation
    (our tables, its block mask) is timed: then by the host's clock, else on the device."""
    device, tokens = torch.device("cuda"), sum(batches[0])
    rule, executor = rivals.PackedMask(mask, tokens, device), AttentionExecutor()
    setting = rivals.for_any_mask(settings[0])
    ratios: dict[bool, list[float]] = {False: [], True: []}
    theirs_in, ours_in = heads_first(tokens, device), packed(tokens, device)
    for seqlens in batches:
        one_plan, blocks = one_rank(mask, seqlens), rule.load(seqlens).blocks()
        ready = executor.ready(one_plan, ours_in[0])

        def theirs(timed: bool) -> None:
            made = rule.blocks() if timed else blocks  # noqa: B023
            there_and_back(rivals.flex(made, setting), theirs_in)

        def ours(timed: bool) -> None:
            executor.prepare(executor.ready(one_plan, ours_in[0]) if timed else ready)  # noqa: B023
            there_and_back(executor.attention, ours_in)

        for timed, clock in ((False, device_medians), (True, host_medians)):
            works: Works = {"ours": partial(ours, timed), "theirs": partial(theirs, timed)}
            seconds = clock(works, repeat)
            ratios[timed].append(seconds["theirs"] / seconds["ours"])
    return {
        timed: (median(each), f"lowest {min(each):.2f}" if len(each) > 1 else "")
        for timed, each in ratios.items()
    }


def there_and_back(attend: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    out = attend(*tensors)
    torch.autograd.grad(out, tensors, out.detach())


def our_attention(
    mask: str, seqlens: list[int], device: torch.device, kernel: str
) -> Callable[[Tensor, Tensor], Tensor]:
    executor = AttentionExecutor(kernel=kernel)
    like = torch.empty(0, device=device, dtype=getattr(torch, SPEC.dtype))
    executor.prepare(executor.ready(one_rank(mask, seqlens), like))
    return executor.attention


# --------------------------------------------------------------------------- whole programs


def program_ratio(plans: list[RankPlan], repeat: int) -> tuple[float, str]:
    """Time of a rank's whole program over that of the same blocks in one launch, forward and
    backward, one rank at a time."""
    device, dtype = torch.device("cuda"), getattr(torch, SPEC.dtype)
    kernel = get_kernel("auto", device, dtype, Call().options(SPEC, needs_grad=True))
    on_device: list[float] = []
    on_host: list[float] = []
    for rank_plan in plans:
        works: Works = {}
        for name, each in (("ours", rank_plan), ("launch", in_one_launch(rank_plan))):
            works[name] = partial(_both_passes, Alone(each, kernel, device, dtype))
        for ratios, clock in ((on_device, device_medians), (on_host, host_medians)):
            seconds = clock(works, repeat)
            ratios.append(seconds["ours"] / seconds["launch"])
    note = f"worst rank {max(on_device):.2f}; with the host's time {mean(on_host):.2f}"
    return mean(on_device), note


def _both_passes(alone: Alone) -> None:
    alone.backward(*alone.forward())


# --------------------------------------------------------------------------- inputs


def one_rank(mask: str, seqlens: list[int]) -> RankPlan:
    batch = SequenceBatch(seqlens, [named_mask(mask, n) for n in seqlens])
    return plan(batch, SPEC, Cluster(devices_per_node=1), strategy=STRATEGY).rank_plan(0)


def packed(tokens: int, device: torch.device) -> list[Tensor]:
    """q and kv as ours takes them."""
    shapes = (tokens, SPEC.num_heads, SPEC.head_dim), (tokens, 2, SPEC.num_kv_heads, SPEC.head_dim)
    return list(_random(shapes, device))


def heads_first(tokens: int, device: torch.device) -> list[Tensor]:
    """q, k and v as torch's take them."""
    heads = (SPEC.num_heads, SPEC.num_kv_heads, SPEC.num_kv_heads)
    return list(_random([(1, count, tokens, SPEC.head_dim) for count in heads], device))


def _random(shapes: Any, device: torch.device) -> Iterator[Tensor]:
    dtype = getattr(torch, SPEC.dtype)
    for shape in shapes:
        yield torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
