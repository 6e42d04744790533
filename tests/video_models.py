"""Tiny models of diffusers as workloads, every size prime to something."""

import diffusers
import numpy as np
import torch
from torch.nn import functional as F

from dcp.datacentric.diffusers import DiffusersWorkload

CHANNELS, WORDS, TEXT_SIZE, HEADS, HEAD_SIZE = 4, 7, 16, 3, 12
# frames, rows and columns of latents; patches are 2 x 2: 2, 6, 18 and 35 tokens
SIZES = [(1, 2, 4), (1, 4, 6), (3, 4, 6), (5, 2, 14)]
SAMPLES = [SIZES[n] for n in (2, 3, 1, 2, 0, 3, 2, 1, 3, 2, 0)]
BLOCKS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_SIZE, "num_layers": 2}


class Clips(DiffusersWorkload):
    """Latents and words drawn for each sample, trained by flow matching."""

    def sizes(self):
        return SAMPLES

    def loss(self, model, samples, epoch):
        clean, noise, words, time = (
            torch.stack(each)
            for each in zip(*(self._drawn(s, epoch) for s in samples), strict=True)
        )
        mixed = clean.lerp(noise, time.view(-1, 1, 1, 1, 1))
        lengths = torch.tensor([3 + sample % (WORDS - 3) for sample in samples])
        seen = torch.arange(WORDS) < lengths[:, None]
        error = self.flow(model, mixed, words, time * 1000, seen) - (noise - clean)
        return error.square().flatten(1).mean(1).sum()

    def _drawn(self, sample, epoch):
        shape = (CHANNELS, *SAMPLES[sample])
        rng, data = self.generator(sample, epoch), self.generator(sample, 1_000_000)
        dtype = next(self.model.parameters()).dtype
        drawn = (
            torch.randn(shape, generator=data),
            torch.randn(shape, generator=rng),
            torch.randn(WORDS, TEXT_SIZE, generator=data),
            torch.rand((), generator=rng),
        )
        return [each.to(dtype) for each in drawn]


class Wan(Clips):
    @classmethod
    def model(cls):
        return diffusers.WanTransformer3DModel(
            **BLOCKS, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_SIZE, freq_dim=16,
            ffn_dim=40, rope_max_seq_len=32,
        )  # fmt: skip

    def flow(self, model, mixed, words, time, seen):
        return model(mixed, time, words).sample


class Wan22(Wan):
    """Wan 2.2 may have a time for each token."""

    def flow(self, model, mixed, words, time, seen):
        tokens = mixed[0, 0].numel() // 4
        return super().flow(model, mixed, words, time[:, None] - torch.arange(tokens), seen)


class LTX(Clips):
    @classmethod
    def model(cls):
        return diffusers.LTXVideoTransformer3DModel(
            **BLOCKS, in_channels=4 * CHANNELS, out_channels=4 * CHANNELS,
            cross_attention_dim=HEADS * HEAD_SIZE, caption_channels=TEXT_SIZE,
        )  # fmt: skip

    def flow(self, model, mixed, words, time, seen):
        batch, _, frames, rows, columns = mixed.shape
        cut = F.pixel_unshuffle(mixed.transpose(1, 2).flatten(0, 1), 2)
        tokens = cut.unflatten(0, (batch, frames)).movedim(2, -1).flatten(1, 3)
        tokens = model(
            tokens,
            words,
            time,
            seen.long(),
            num_frames=frames,
            height=rows // 2,
            width=columns // 2,
        ).sample
        cut = tokens.unflatten(1, (frames, rows // 2, columns // 2)).movedim(-1, 2)
        flow = F.pixel_shuffle(cut.flatten(0, 1), 2)
        return flow.unflatten(0, (batch, frames)).transpose(1, 2)


class CogVideoX(Clips):
    @classmethod
    def model(cls):
        return diffusers.CogVideoXTransformer3DModel(
            **BLOCKS, in_channels=CHANNELS, out_channels=CHANNELS, text_embed_dim=TEXT_SIZE,
            time_embed_dim=8, max_text_seq_length=WORDS, use_rotary_positional_embeddings=True,
        )  # fmt: skip

    def flow(self, model, mixed, words, time, seen):
        tokens = mixed[0, 0].numel() // 4
        angles = torch.arange(tokens)[:, None] / torch.arange(1, HEAD_SIZE // 2 + 1)
        angles = angles.repeat_interleave(2, 1)
        found = model(
            mixed.transpose(1, 2), words, time, image_rotary_emb=(angles.cos(), angles.sin())
        ).sample
        return found.transpose(1, 2)


class HunyuanVideo(Clips):
    @classmethod
    def model(cls, **others):
        return diffusers.HunyuanVideoTransformer3DModel(
            **BLOCKS, in_channels=CHANNELS, out_channels=CHANNELS, text_embed_dim=TEXT_SIZE,
            num_single_layers=2, num_refiner_layers=1, pooled_projection_dim=8, mlp_ratio=2.0,
            guidance_embeds=False, rope_axes_dim=(4, 4, 4), **others,
        )  # fmt: skip

    def flow(self, model, mixed, words, time, seen):
        pooled = words[:, 0, :8]
        return model(mixed, time.long(), words, seen, pooled).sample


FAMILIES = {each.__name__: each for each in (Wan, Wan22, LTX, CogVideoX, HunyuanVideo)}


def workload_of(name):
    """The family's tiny model, with every weight random, those that start as zero too."""
    kind = FAMILIES[name]
    model = kind.model()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in model.parameters():
            fan = weight[0].numel() if weight.dim() > 1 else 4
            drawn = rng.standard_normal(weight.shape) / fan**0.5
            weight.copy_(torch.as_tensor(drawn) + (weight.dim() == 1))
    return kind(model)
