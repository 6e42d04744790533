"""LTX-Video with planned attention: videos of different sizes as one packed sequence.

::

    packed = PackedLTX(model, executor)          # an LTXVideoTransformer3DModel of diffusers
    shapes = [(16, 12, 20), (1, 22, 40), …]      # latent frames, rows and columns of each video
    plan = dcp.plan(packed.batch(shapes), packed.spec, cluster)
    executor.prepare(plan)
    share = packed.share(plan, shapes)
    flow = share.local(model(**share.inputs(share.rows(noisy), texts, timesteps)).sample)
    loss = (flow - share.rows(target)).square().sum() / num_values_of_all_ranks

Every video is a sequence under a full mask, and the planner cuts the batch like any other. Nothing
of the model is replaced but the processors of its attention layers, by its own
``set_attn_processor``: its forward takes tokens instead of a grid, and for every token the time
that modulates it and its coordinates. What a rank's tokens are, goes in by those arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb
from torch import Tensor

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.plans import Plan
from dcp.program import RankPlan
from dcp.ragged import starts
from dcp.runtime import AttentionExecutor

__all__ = ["PackedLTX", "PackedShare"]

Shape = tuple[int, int, int]  # latent frames, rows, columns
# Seconds and pixels of a latent step, as the library's pipelines take them: 8 frames at 25 a
# second, 32 x 32 pixels.
ROPE_SCALE = (8 / 25, 32.0, 32.0)


class PackedLTX:
    """An LTX-Video transformer whose attention is planned.

    Its self-attention goes to ``executor``, with the plan in use; its cross-attention shows each
    video its own text alone. From now on the model takes what :meth:`PackedShare.inputs` gives
    and nothing else; ``model.set_attn_processor(LTXVideoAttnProcessor())`` makes it as it was.
    All ranks call it, one without tokens too, because it computes for the others.

    Args:
        dtype: that attention runs in, such as autocast's; None is that of the model's weights.

    Raises ``ValueError`` for any other model.
    """

    def __init__(
        self, model: Any, executor: AttentionExecutor | Any, *, dtype: str | None = None
    ) -> None:
        if not isinstance(model, LTXVideoTransformer3DModel):
            raise ValueError(
                f"{type(model).__name__} cannot be given packed videos: only "
                "LTXVideoTransformer3DModel takes the time and the coordinates of every token; "
                "train it with data-centric groups instead"
            )
        ltx: Any = model  # the library has no types
        self.config, self.executor = ltx.config, executor
        own, text = PackedSelfAttention(executor), PackedCrossAttention()
        ltx.set_attn_processor(
            {name: own if ".attn1." in name else text for name in ltx.attn_processors}
        )
        self.spec = AttentionSpec(
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            dtype=dtype or ltx.dtype,
        )

    @property
    def patch(self) -> Shape:
        """Latent frames, rows and columns of one token."""
        config = self.config
        return config.patch_size_t, config.patch_size, config.patch_size

    def batch(self, shapes: Sequence[Shape]) -> SequenceBatch:
        """What to plan for videos of these latent frames, rows and columns."""
        return SequenceBatch(_grids(shapes, self.patch).prod(axis=1), "full")

    def share(self, plan: Plan | RankPlan, shapes: Sequence[Shape]) -> PackedShare:
        """This rank's tokens of the batch that was planned.

        Raises ``ValueError`` if the plan is of another batch.
        """
        mine = plan.rank_plan(self.executor.rank) if isinstance(plan, Plan) else plan
        grids = _grids(shapes, self.patch)
        sizes = grids.prod(axis=1)
        sample_ids, positions = mine.sequence_ids, mine.positions
        known = mine.num_tokens == sizes.sum() and sample_ids.max(initial=-1) < len(sizes)
        if not known or (mine.token_indices != starts(sizes)[sample_ids] + positions).any():
            raise ValueError(
                f"the plan of {mine.num_tokens} tokens is not of these {len(sizes)} videos of "
                f"{sizes.sum()} tokens in this order: plan packed.batch(shapes) of the same shapes"
            )
        return PackedShare(
            shapes=list(shapes),
            patch=self.patch,
            grids=grids,
            sample_ids=sample_ids,
            positions=positions,
            words_width=self.config.caption_channels,
        )


@dataclass(frozen=True, kw_only=True)
class PackedShare:
    """The tokens of a batch of videos that a rank owns, in the plan's order.

    Attributes:
        shapes, patch, grids: latents of each video, of a token, and tokens of each ``[videos, 3]``.
        sample_ids: video of each local token, int64 ``[local]``.
        positions: place of each in its video, frame by frame and row by row, int64 ``[local]``.
        words_width: channels of a text.
    """

    shapes: list[Shape]
    patch: Shape
    grids: np.ndarray
    sample_ids: np.ndarray
    positions: np.ndarray
    words_width: int

    @property
    def samples(self) -> list[int]:
        """Videos of which the rank owns tokens: all that it has to load."""
        return np.unique(self.sample_ids).tolist()

    def rows(self, videos: Sequence[Tensor | None]) -> Tensor:
        """``[local, channels]``: local tokens of videos ``[channels, frames, rows, columns]``.

        Only :attr:`samples` are read, but one at least has to be there, for its kind of numbers.
        """
        _check_count("videos", videos, len(self.shapes))
        found = [self._rows_of(sample, videos[sample]) for sample in self.samples]
        if not found:
            like = next((video for video in videos if video is not None), None)
            if like is None:
                raise ValueError("give one video at least, for its channels, dtype and device")
            found = [like.new_empty(0, like.shape[0] * int(np.prod(self.patch)))]
        # local tokens by video, and back to the plan's order
        order = torch.from_numpy(np.argsort(self.sample_ids, kind="stable"))
        whole = torch.cat(found)
        return whole.new_empty(whole.shape).index_copy(0, order.to(whole.device), whole)

    def of_samples(self, values: Tensor) -> Tensor:
        """``[local, …]``: what belongs to each local token's video, from ``[videos, …]``."""
        _check_count("values", values, len(self.shapes))
        return values[torch.from_numpy(self.sample_ids).to(values.device)]

    def inputs(
        self,
        rows: Tensor,
        texts: Sequence[Tensor | None],
        timesteps: Tensor,
        *,
        scales: Sequence[tuple[float, float, float]] | None = None,
    ) -> dict[str, Any]:
        """The keywords of the model for this rank's tokens.

        Args:
            rows: noisy latents ``[local, channels]``, see :meth:`rows`.
            texts: embeddings of each video's prompt ``[words, caption_channels]``, padding left
                out; only those of :attr:`samples` are read.
            timesteps: of each video ``[videos]``, 0 to 1000.
            scales: seconds, rows and columns of pixels that a latent is apart, of each video; None
                is :data:`ROPE_SCALE` for all. What is ``rope_interpolation_scale`` elsewhere.
        """
        _check_count("texts", texts, len(self.shapes))
        scales = [ROPE_SCALE] * len(self.shapes) if scales is None else scales
        _check_count("scales", scales, len(self.shapes))
        needed = [_words(texts[sample], sample) for sample in self.samples]
        times = self.of_samples(timesteps.to(rows.device))
        spans = self._spans([len(words) for words in needed])
        coordinates = self._coordinates(scales)
        if not needed:  # the model's reshapes need a token, and that a word; see PackedShare.local
            rows, times = rows.new_zeros(1, rows.shape[1]), times.new_zeros(1)
            needed = [rows.new_zeros(1, self.words_width)]
            spans, coordinates = torch.tensor([(0, 1, 0, 1)]), torch.zeros(3, 1)
        return {
            "hidden_states": rows[None],
            "encoder_hidden_states": torch.cat(needed)[None],
            "timestep": times[None],
            "encoder_attention_mask": spans[None],
            "video_coords": coordinates[None].to(rows.device),
        }

    def local(self, output: Tensor) -> Tensor:
        """``[local, channels]`` of the model's output ``[1, rows, channels]``.

        A rank without tokens fed it one stand-in, which is left out.
        """
        return output[0, : len(self.sample_ids)]

    def _rows_of(self, sample: int, video: Tensor | None) -> Tensor:
        shape = self.shapes[sample]
        if video is None or tuple(video.shape[1:]) != tuple(shape):
            found = None if video is None else tuple(video.shape)
            raise ValueError(
                f"video {sample} has latents {found}, planned were (channels, *{shape})"
            )
        (f, h, w), (t, p, q) = self.grids[sample].tolist(), self.patch
        cut = video.reshape(-1, f, t, h, p, w, q).permute(1, 3, 5, 0, 2, 4, 6)
        own = torch.from_numpy(self.positions[self.sample_ids == sample]).to(video.device)
        return cut.reshape(f * h * w, -1)[own]

    def _spans(self, num_words: list[int]) -> Tensor:
        """``[runs, 4]``: rows of tokens, and of words that they see; see PackedCrossAttention."""
        ends = np.cumsum(num_words).tolist()
        words = {s: (end - n, end) for s, n, end in zip(self.samples, num_words, ends, strict=True)}
        edges = np.flatnonzero(np.diff(self.sample_ids, prepend=-1, append=-1)).tolist()
        runs = [(q0, q1, *words[int(self.sample_ids[q0])]) for q0, q1 in pairwise(edges)]
        return torch.tensor(runs)

    def _coordinates(self, scales: Sequence[tuple[float, float, float]]) -> Tensor:
        """``[3, local]`` float32: seconds and pixels where each local token begins."""
        _, rows, columns = self.grids[self.sample_ids].T
        at = np.stack(
            [
                self.positions // (rows * columns),
                self.positions // columns % rows,
                self.positions % columns,
            ]
        )
        steps = np.asarray(scales, dtype=np.float32)[self.sample_ids].T
        sizes = np.array(self.patch, dtype=np.float32)[:, None]
        return torch.from_numpy(at.astype(np.float32) * steps * sizes)


class PackedSelfAttention:
    """Processor of an attention layer: this rank's tokens over the whole batch."""

    def __init__(self, executor: AttentionExecutor | Any) -> None:
        self.executor = executor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "planned self-attention takes no other states and no mask: leave them out"
            )
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(each, image_rotary_emb) for each in (query, key))
        q, k, v = (
            each[0].unflatten(-1, (attn.heads, -1)).to(value.dtype) for each in (query, key, value)
        )
        plan = self.executor.plan
        stand_in = plan is not None and plan.num_local_tokens == 0
        if stand_in:
            q, k, v = q[:0], k[:0], v[:0]
        out = self.executor.attention(q, (k, v)).flatten(1)
        if stand_in:  # attention stays in the graph: its backward works for other ranks
            out = torch.cat([out, out.new_zeros(1, attn.inner_dim)])
        return attn.to_out[1](attn.to_out[0](out[None]))


class PackedCrossAttention(LTXVideoAttnProcessor):
    """The model's own processor, called for one video's tokens and words after the other.

    It takes ``attention_mask`` as a table of int64 ``[1, runs, 4]``: a run of tokens, half-open,
    and the run of words that they see. The table is an argument of the layer, so that recomputed
    layers get that of their own batch.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        runs = attention_mask
        if encoder_hidden_states is None or runs is None or runs.is_floating_point():
            raise ValueError("packed videos are given to the model as PackedShare.inputs has them")
        attend = super().__call__
        return torch.cat(
            [
                attend(attn, hidden_states[:, q0:q1], encoder_hidden_states[:, k0:k1])
                for q0, q1, k0, k1 in runs[0].tolist()
            ],
            dim=1,
        )


def _grids(shapes: Sequence[Shape], patch: Shape) -> np.ndarray:
    """Tokens along each axis of each video, int64 ``[videos, 3]``."""
    for number, shape in enumerate(shapes):
        divided = len(shape) == 3 and all(
            n > 0 and n % p == 0 for n, p in zip(shape, patch, strict=True)
        )
        if not divided:
            raise ValueError(
                f"video {number} has latents of {tuple(shape)}: give frames, rows and columns, "
                f"each a multiple of the model's patch {patch}"
            )
    return np.array(shapes, dtype=np.int64).reshape(-1, 3) // np.array(patch)


def _check_count(name: str, given: Any, wanted: int) -> None:
    if len(given) != wanted:
        raise ValueError(f"{len(given)} {name} for {wanted} videos: give one for each")


def _words(text: Tensor | None, sample: int) -> Tensor:
    if text is None or text.ndim != 2 or len(text) == 0:
        found = None if text is None else tuple(text.shape)
        raise ValueError(
            f"video {sample} has a text of {found}: give embeddings (words, channels) of one word "
            "at least, such as those of an empty prompt"
        )
    return text
