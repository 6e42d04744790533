"""A small spatial-temporal diffusion transformer.

The block structure is that of STDiT3 (Open-Sora 1.2): spatial and temporal blocks alternate; each
has self-attention and an MLP under adaptive layer norm, and cross-attention to the text between.
Sequence parallelism is DSP's (arXiv 2403.10266): tokens are shared out over space, temporal blocks
need no exchange, and spatial attention shares out frames instead while it runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dcp.datacentric.sequence_group import SequenceGroup


@dataclass(frozen=True, kw_only=True)
class VideoModelConfig:
    """``depth``: spatial blocks, and as many temporal ones. Patches are ``patch`` x ``patch``."""

    hidden_size: int
    depth: int
    num_heads: int
    channels: int = 4
    patch: int = 2
    text_size: int = 16
    mlp_ratio: int = 4

    @property
    def patch_size(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch**2

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` beside the weights, as transformers' configurations do."""
        (folder / "config.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


class Attention(nn.Module):
    """Self-attention over the middle dimension, or attention to ``context``; heads normalised."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, head_size = num_heads, width // num_heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.query_norm, self.key_norm = nn.RMSNorm(head_size), nn.RMSNorm(head_size)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, angles: Tensor | None = None
    ) -> Tensor:
        """``x`` ``[rows, tokens, width]``; ``angles`` of rotary embeddings ``[tokens, pairs]``."""
        source = x if context is None else context
        q = self.query_norm(self._heads(self.query(x)))
        k, v = map(self._heads, self.key_value(source).chunk(2, -1))
        k = self.key_norm(k)
        if angles is not None:
            q, k = _rotate(q, angles), _rotate(k, angles)
        if q.numel() == 0:  # this rank has no rows; keep it in the graph
            return self.out(q.transpose(1, 2).reshape(x.shape))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        return x.view(rows, tokens, self.num_heads, width // self.num_heads).transpose(1, 2)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """One spatial or temporal block."""

    gradient_checkpointing = False  # of this layer: recompute it in the backward pass

    def __init__(self, config: VideoModelConfig, kind: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.kind = kind
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2)
        )
        self.attention = Attention(width, config.num_heads)
        self.cross = Attention(width, config.num_heads)
        inner = config.mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU("tanh"), nn.Linear(inner, width))
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, group: SequenceGroup, space: int
    ) -> Tensor:
        """``x`` ``[batch, frames, local space, width]`` of ``space`` in all; ``time``: ``[batch, 6,
        width]``; ``text``: ``[batch, words, width]``."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(self._run, x, text, time, group, space, use_reentrant=False)
        return self._run(x, text, time, group, space)

    def _run(
        self, x: Tensor, text: Tensor, time: Tensor, group: SequenceGroup, space: int
    ) -> Tensor:
        changes = (self.modulation + time)[:, None, None].unbind(3)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = changes
        attend = self._spatial if self.kind == "spatial" else self._temporal
        x = x + gate * attend(self.norms[0](x) * (1 + scale) + shift, group, space)
        batch, frames, local, width = x.shape
        x = x + self.cross(x.reshape(batch, frames * local, width), text).view(x.shape)
        return x + gate_mlp * self.mlp(self.norms[1](x) * (1 + scale_mlp) + shift_mlp)

    def _spatial(self, x: Tensor, group: SequenceGroup, space: int) -> Tensor:
        rows = x.flatten(0, 1)
        whole = group.switch(rows, gather=1, split=0, total=space)
        out = group.switch(self.attention(whole), gather=0, split=1, total=len(rows))
        return out.view(x.shape)

    def _temporal(self, x: Tensor, group: SequenceGroup, space: int) -> Tensor:
        batch, frames, local, width = x.shape
        columns = x.transpose(1, 2).reshape(batch * local, frames, width)
        pairs = width // self.attention.num_heads // 2
        angles = _frequencies(torch.arange(frames, device=x.device), pairs)
        out = self.attention(columns, angles=angles)
        return out.view(batch, local, frames, width).transpose(1, 2)


def _frequencies(at: Tensor, count: int) -> Tensor:
    """``at`` times ``count`` falling frequencies: ``[…, count]``, fp64."""
    rates = torch.exp(-math.log(10_000) * torch.arange(count, dtype=torch.float64) / count)
    return at[..., None].double() * rates.to(at.device)


def _waves(at: Tensor, width: int) -> Tensor:
    """Sine and cosine features ``[…, width]``; an odd width ends with a 0."""
    angles = _frequencies(at, width // 2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, width % 2))


class SpaceTimeTransformer(nn.Module):
    """Predicts the flow of noised latents, patch by patch."""

    def __init__(self, config: VideoModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.sizes = config
        self.patches = nn.Linear(config.patch_size, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.extent = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.time_changes = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.text = nn.Sequential(
            nn.Linear(config.text_size, width), nn.GELU("tanh"), nn.Linear(width, width)
        )
        kinds = ("spatial", "temporal") * config.depth
        self.blocks = nn.ModuleList(Block(config, kind) for kind in kinds)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.out = nn.Linear(width, config.patch_size)

    def forward(
        self,
        patches: Tensor,
        time: Tensor,
        text: Tensor,
        grid: tuple[int, int],
        group: SequenceGroup,
    ) -> Tensor:
        """Flow of this rank's patches, ``[batch, frames, local space, patch size]`` as ``patches``.

        Args:
            time: 0 (clean) to 1 (noise), ``[batch]``.
            text: embedded words, ``[batch, words, text size]``.
            grid: rows and columns of patches of a frame, over all ranks of ``group``.
        """
        space, frames, dtype = grid[0] * grid[1], patches.shape[1], self.patches.weight.dtype
        width = self.sizes.hidden_size
        place = self._places(grid, patches.device)[group.part(space)]
        x = self.patches(patches) + place.to(dtype)
        when = self.time(_waves(time * 1000, width).to(dtype))
        sizes = torch.tensor([float(frames), float(space)], device=x.device)
        when = when + self.extent(_waves(sizes, width).sum(0).to(dtype))
        changes = self.time_changes(when).view(-1, 6, width)
        words = self.text(text)
        for block in self.blocks:
            x = block(x, words, changes, group, space)
        shift, scale = (self.final_modulation + when[:, None])[:, None, None].unbind(3)
        return self.out(self.norm(x) * (1 + scale) + shift)

    def _places(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Embedding of each patch's place in its frame, relative to it: ``[space, width]``."""
        half = self.sizes.hidden_size // 2
        rows, columns = (torch.arange(n, device=device) / n * 32 for n in grid)
        row = _waves(rows, half)[:, None].expand(-1, grid[1], -1)
        column = _waves(columns, self.sizes.hidden_size - half)[None].expand(grid[0], -1, -1)
        return torch.cat([row, column], -1).flatten(0, 1)
