"""The video workload: latents of many sizes, trained by flow matching (arXiv 2209.03003)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp.datacentric.buckets import Bucket, draw_buckets, video_buckets
from dcp.datacentric.clips import TEXT_SIZE, WORDS, rendered_latents, synthetic_latents
from dcp.datacentric.config import VideoArguments
from dcp.datacentric.sequence_group import SequenceGroup
from dcp.datacentric.video_model import SpaceTimeTransformer, VideoModelConfig
from dcp.datacentric.workload import Workload

# Small latents for a small model: 64 x 64 pixels, 17 frames; the largest bucket has 1,440 patches.
PIXELS, FRAMES = 64, 85


@dataclass(frozen=True)
class VideoBatch:
    """Clean latents ``[batch, channels, frames, height, width]``, noise of that shape, the time of
    each sample ``[batch]`` and its text ``[batch, words, text size]``."""

    latents: Tensor
    noise: Tensor
    time: Tensor
    text: Tensor


class VideoWorkload(Workload):
    """Synthetic latents or rendered clips, in 25 buckets.

    The loss is a mean over samples, each a mean over the numbers of its latents. Noise and time of
    a sample depend on seed, epoch and sample alone: not on the rank, the group or the batch.
    """

    def __init__(
        self,
        config: VideoArguments,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
        dtype: str = "float32",
        buckets: Sequence[Bucket] | None = None,
    ) -> None:
        super().__init__(device=device, seed=seed)
        self.config = config
        self.buckets = list(buckets or video_buckets(pixels=PIXELS, frames=FRAMES))
        drawn = draw_buckets(
            self.buckets, config.video_samples, config.video_distribution, seed=seed
        )
        self.bucket_of = [bucket.name for bucket in drawn]
        self._shapes = [bucket.shape for bucket in drawn]
        self._model_config = VideoModelConfig(
            hidden_size=config.hidden_size,
            depth=config.num_layers,
            num_heads=config.num_heads,
            text_size=TEXT_SIZE,
        )
        self.depth = {"spatial": config.num_layers, "temporal": config.num_layers}
        self.identity = {
            "kind": "video",
            **asdict(self._model_config),
            "dtype": dtype,
            "buckets": {bucket.name: list(bucket.shape) for bucket in self.buckets},
        }

    def sizes(self) -> Sequence[tuple[int, ...]]:
        return self._shapes

    def build(self, depth: int | None = None) -> nn.Module:
        torch.manual_seed(self.seed)
        config = self._model_config if depth is None else replace(self._model_config, depth=depth)
        return SpaceTimeTransformer(config).to(self.device)

    def layers(self, model: nn.Module) -> dict[str, list[Any]]:
        blocks: Any = model.blocks
        return {kind: [b for b in blocks if b.kind == kind] for kind in ("spatial", "temporal")}

    def load(self, samples: Sequence[int], epoch: int) -> VideoBatch:
        seed = self.seed
        make = rendered_latents if self.config.video_source == "rendered" else synthetic_latents
        made = [make(self._shapes[s], np.random.default_rng([seed, s])) for s in samples]
        rngs = [np.random.default_rng([seed, s, epoch]) for s in samples]
        noise = [
            rng.standard_normal(latents.shape) for rng, (latents, _) in zip(rngs, made, strict=True)
        ]
        time = [rng.uniform() for rng in rngs]
        latents, text = zip(*made, strict=True)
        return VideoBatch(*(self._tensor(np.stack(each)) for each in (latents, noise, time, text)))

    def stand_in(self, bucket: Bucket, batch_size: int) -> VideoBatch:
        shape = (batch_size, self._model_config.channels, *bucket.shape)
        latents, noise = torch.zeros(2, *shape, device=self.device)
        time = torch.full((batch_size,), 0.5, device=self.device)
        return VideoBatch(
            latents, noise, time, torch.zeros(batch_size, WORDS, TEXT_SIZE, device=self.device)
        )

    def summed_loss(self, model: nn.Module, batch: VideoBatch, group: SequenceGroup) -> Tensor:
        dtype = next(model.parameters()).dtype
        clean, noise = batch.latents.to(dtype), batch.noise.to(dtype)
        time = batch.time.to(dtype)[:, None, None, None, None]
        patches, grid = self._patches(clean + time * (noise - clean))
        target, _ = self._patches(noise - clean)
        real, _ = self._patches(torch.ones_like(clean))  # 0 where a frame's edge is padded
        mine = group.part(grid[0] * grid[1])
        flow = model(patches[:, :, mine], batch.time, batch.text.to(dtype), grid, group)
        error = (flow - target[:, :, mine]).square() * real[:, :, mine]
        wide = torch.promote_types(error.dtype, torch.float32)
        return error.to(wide).sum() / clean[0].numel()

    def num_tokens(self, samples: Sequence[int]) -> int:
        patch = self._model_config.patch
        shapes = [self._shapes[sample] for sample in samples]
        return sum(t * -(-h // patch) * -(-w // patch) for t, h, w in shapes)

    def _patches(self, latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``[batch, frames, space, patch size]`` and the grid of a frame; edges padded with 0."""
        patch = self._model_config.patch
        batch, channels, frames, height, width = latents.shape
        latents = F.pad(latents, (0, -width % patch, 0, -height % patch))
        rows, columns = latents.shape[3] // patch, latents.shape[4] // patch
        cut = latents.view(batch, channels, frames, rows, patch, columns, patch)
        cut = cut.permute(0, 2, 3, 5, 1, 4, 6)
        return cut.reshape(batch, frames, rows * columns, -1), (rows, columns)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)
