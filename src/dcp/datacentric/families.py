"""Video transformers of diffusers that declare no context-parallel plan: what theirs would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from dcp.datacentric.splitting import MAIN, OTHER, Plan


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        plan: what is split and gathered, as ``_cp_plan`` says it.
        order: of the two sequences in attention over both.
        prepare: makes a model ready, or raises ``ValueError`` with what it cannot do.
    """

    plan: Plan
    order: tuple[str, str]
    prepare: Callable[[Any], None]


class JointProcessor:
    """Attention of CogVideoX over a text and a video, by way of diffusers' dispatcher; its own
    processor calls torch instead, where nothing can be exchanged."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        words = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            project(x).unflatten(2, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            self._placed(raw if norm is None else norm(raw), words, image_rotary_emb)
            for raw, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2).to(query.dtype)
        for layer in attn.to_out:
            out = layer(out)
        return out[:, words:], out[:, :words]

    def _placed(self, x: Tensor, words: int, rotary: Any) -> Tensor:
        """With rotary embeddings, which the text has not got."""
        if rotary is None:
            return x
        video: Any = apply_rotary_emb(x[:, words:], rotary, sequence_dim=1)
        return torch.cat([x[:, :words], video], 1)


def _through_the_dispatcher(model: Any) -> None:
    """For CogVideoX."""
    model.set_attn_processor({name: JointProcessor() for name in model.attn_processors})


def _no_first_frame(model: Any) -> None:
    """For HunyuanVideo."""
    if model.config.image_condition_type == "token_replace":
        raise ValueError(
            "a HunyuanVideo model with image_condition_type='token_replace' treats the tokens of "
            "its first frame apart, by their place in the sequence, which is split here: use "
            "'latent_concat', or a text-to-video model"
        )


_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_PLACES = ContextParallelInput(split_dim=0, expected_dims=2)
_PLACES_MADE = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
_WHOLE = ContextParallelOutput(gather_dim=1, expected_dims=3)

FAMILIES = {
    "CogVideoXTransformer3DModel": Family(
        plan={
            "transformer_blocks.0": {MAIN: _TOKENS, OTHER: _TOKENS},
            "transformer_blocks.*": {"image_rotary_emb": (_PLACES, _PLACES)},
            "proj_out": _WHOLE,
        },
        order=(OTHER, MAIN),
        prepare=_through_the_dispatcher,
    ),
    "HunyuanVideoTransformer3DModel": Family(
        plan={
            "transformer_blocks.0": {MAIN: _TOKENS, OTHER: _TOKENS},
            "rope": {0: _PLACES_MADE, 1: _PLACES_MADE},
            "proj_out": _WHOLE,
        },
        order=(MAIN, OTHER),
        prepare=_no_first_frame,
    ),
}
