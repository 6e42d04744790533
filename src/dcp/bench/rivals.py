"""What our kernels are measured against: torch's FlexAttention and its fused attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

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

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(name: str, seqlens: Sequence[int], device: torch.device) -> MaskMod:
    """FlexAttention's function for one of our named masks over packed sequences."""
    document = torch.repeat_interleave(
        torch.arange(len(seqlens), device=device), torch.tensor(seqlens, device=device)
    )
    ends = torch.tensor([0, *seqlens], device=device).cumsum(0)
    position = torch.arange(int(ends[-1]), device=device) - ends[document]
    length = torch.tensor(seqlens, device=device)[document]
    answer = torch.cat([_answers(n) for n in seqlens]).to(device)

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = position[i], position[j]
        seen = (document[i] == document[j]) & (q >= k)
        if name == "streaming":
            seen &= (q - k < 4096) | (k < 64)
        elif name == "causal_blockwise":
            last = (length[i] - 1) // 256 * 256
            seen &= (q < 256) | (k < 256) | (q >= last) | (q - k <= 512)
        elif name == "shared_question":
            seen &= (answer[j] == 0) | (answer[i] == answer[j])
        return seen

    return rule


def _answers(seqlen: int, fraction: float = 0.2, num_answers: int = 4) -> Tensor:
    """0 for tokens of the question, 1 … for those of each answer."""
    question = int(seqlen * fraction)
    share = (seqlen - question) // num_answers
    starts = [0, *(question + share * n for n in range(num_answers)), seqlen]
    starts[-1] = seqlen
    return torch.cat([torch.full((b - a,), n) for n, (a, b) in enumerate(pairwise(starts))])


def block_mask(rule: MaskMod, tokens: int, device: torch.device) -> BlockMask:
    return create_block_mask(rule, None, None, tokens, tokens, device=device, _compile=True)


def flex_settings(head_dim: int) -> list[FlexKernelOptions]:
    """Kernel options to choose the best from; the empty one is torch's own choice."""
    sizes = [(128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)] if head_dim <= 128 else []
    return [FlexKernelOptions()] + [
        FlexKernelOptions(BLOCK_M=m, BLOCK_N=n, num_warps=w, num_stages=s) for m, n, w, s in sizes
    ]


def flex(
    blocks: BlockMask, options: FlexKernelOptions
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention on ``[1, heads, tokens, head_dim]``."""
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, block_mask=blocks, enable_gqa=True, kernel_options=options or None)


def fused(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One backend of torch's fused attention, causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend
