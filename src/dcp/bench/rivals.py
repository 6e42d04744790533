"""What our kernels are measured against: torch's FlexAttention and its fused attention; the host's
clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import (
    BlockMask,
    FlexKernelOptions,
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import scaled_dot_product_attention

from dcp.runtime.kernels.device_clock import Works


def host_medians(works: Works, repeat: int) -> dict[str, float]:
    """Median seconds of each work by the host's clock, launches included; they take turns, so that
    a busy machine slows all alike."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            sync()
            began = perf_counter()
            work()
            sync()
            if turn:  # the first compiles and warms up
                times[name].append(perf_counter() - began)
    return {name: median(each) for name, each in times.items()}


@contextmanager
def compiling() -> Iterator[None]:
    """The compiler's settings under which FlexAttention is measured: its backward pass may run
    again, and more cases than are compiled at once are an error, not a slow eager run."""
    from torch._dynamo import config as dynamo  # not before: both bring Triton
    from torch._functorch import config as functorch

    torch.compiler.reset()
    with (
        functorch.patch(donated_buffer=False),
        dynamo.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
    ):
        yield


class PackedMask:
    """FlexAttention's function for one of our named masks over ``tokens`` packed tokens.

    The function stays the same for every batch, and so does what is compiled for it: a batch only
    changes what is in its tensors.
    """

    def __init__(self, name: str, tokens: int, device: torch.device) -> None:
        self.name, self.tokens, self.device = name, tokens, device
        self.numbers = torch.zeros((4, tokens), dtype=torch.int32, device=device)
        self.rule = _rule(name, *self.numbers)

    def load(self, seqlens: Sequence[int]) -> PackedMask:
        """Make it the mask of a batch; block masks made before are of no use any more."""
        lengths = torch.tensor(seqlens)
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        start = (lengths.cumsum(0) - lengths)[document]
        position = torch.arange(self.tokens) - start
        answer = torch.cat([_answers(n) for n in seqlens])
        self.numbers.copy_(torch.stack([document, position, lengths[document], answer]))
        return self

    def blocks(self) -> BlockMask:
        """The block mask of the batch."""
        return create_block_mask(
            self.rule, None, None, self.tokens, self.tokens, device=self.device, _compile=True
        )


def _rule(
    name: str, document: Tensor, position: Tensor, length: Tensor, answer: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = position[i], position[j]
        seen = (document[i] == document[j]) & (q >= k)
        if name == "streaming":
            seen = seen & ((q - k < 4096) | (k < 64))
        elif name == "causal_blockwise":
            last = (length[i] - 1) // 256 * 256
            seen = seen & ((q < 256) | (k < 256) | (q >= last) | (q - k <= 512))
        elif name == "shared_question":
            seen = seen & ((answer[j] == 0) | (answer[i] == answer[j]))
        return seen

    return rule


def _answers(seqlen: int, fraction: float = 0.2, num_answers: int = 4) -> Tensor:
    """0 for tokens of the question, 1 … for those of each answer."""
    question = int(seqlen * fraction)
    share = (seqlen - question) // num_answers
    starts = [0, *(question + share * n for n in range(num_answers)), seqlen]
    starts[-1] = seqlen
    return torch.cat([torch.full((b - a,), n) for n, (a, b) in enumerate(pairwise(starts))])


def flex_settings(head_dim: int) -> list[FlexKernelOptions]:
    """Kernel options of a causal mask to choose the best from; the first is torch's own choice."""
    safe = FlexKernelOptions(
        ROWS_GUARANTEED_SAFE=True, BLOCKS_ARE_CONTIGUOUS=True, PRESCALE_QK=True
    )
    tiles = [((128, 128, 8, 2), (64, 64, 64, 64, 4, 2)), ((64, 64, 4, 3), (32, 128, 128, 32, 8, 2))]
    tiles += [((128, 64, 8, 3), (64, 128, 128, 64, 8, 2))]
    return [FlexKernelOptions(), safe] + [
        cast(FlexKernelOptions, {**safe, **_tile(*each), "USE_TMA": tma})
        for tma in (False, True)
        for each in tiles
        if head_dim <= 128
    ]


def _tile(forward: tuple[int, ...], backward: tuple[int, ...]) -> dict[str, int]:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    backward_names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages")
    return {f"fwd_{name}": value for name, value in zip(names, forward, strict=True)} | {
        f"bwd_{name}": value for name, value in zip(backward_names, backward, strict=True)
    }


def for_any_mask(setting: FlexKernelOptions) -> FlexKernelOptions:
    """The setting without what holds for a causal mask alone."""
    kept = {name: value for name, value in setting.items() if name != "BLOCKS_ARE_CONTIGUOUS"}
    return cast(FlexKernelOptions, kept)


def flex(
    blocks: BlockMask, options: FlexKernelOptions
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention on ``[1, heads, tokens, head_dim]``."""
    return partial(_compiled(), block_mask=blocks, enable_gqa=True, kernel_options=options or None)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def fused(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One backend of torch's fused attention, causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend
