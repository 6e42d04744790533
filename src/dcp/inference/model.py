"""Hugging Face models whose attention layers keep their keys and values in sharded caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dcp.batch import AttentionSpec
from dcp.inference.attention import CachedAttention
from dcp.inference.reach import Reach, reach_of
from dcp.inference.weights import share_weights
from dcp.integrations.describe import attention_of
from dcp.integrations.model_checks import rotary_limit, try_model
from dcp.integrations.model_masks import Asked, asked_of, register_masks
from dcp.integrations.transformers import dcp_attention, local_logits, register_attention
from dcp.ragged import runs
from dcp.runtime.kernels import KV, pack_kv
from dcp.runtime.session import Call

NAME = "dcp_cached"


@dataclass(frozen=True)
class Layer:
    """One layer of a :class:`CachedAttention`, as :func:`dcp_attention` calls an executor."""

    cached: CachedAttention
    index: int
    plan = None  # masks are compared here

    def attention(
        self,
        q: Tensor,
        kv: KV,
        *,
        mask: str | None = None,
        sink: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of the new tokens in this layer. Raises ``ValueError`` for a named mask."""
        if mask is not None:
            raise ValueError(f"mask {mask!r} cannot be honoured: each layer has its own here")
        call = Call(**options)
        return self.cached.attention(self.index, q, pack_kv(kv), sink=sink, call=call)

    def check(self, module: Any, asked: Asked) -> None:
        """Raise ``ValueError`` unless what a layer asks for is what its cache keeps."""
        reach, seen = self.cached.reach_of(self.index), self.cached.compared
        if (reach, asked.rule) in seen:
            return
        seen.add((reach, asked.rule))
        if asked.fault or not asked.is_from(reach.first, self.cached.longest):
            reason = asked.fault or "what it asks to see is not what its configuration says"
            raise ValueError(
                f"{type(module).__name__} of layer {self.index} cannot be served with {reach}: "
                f"{reason}"
            )


def cached_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Asked | None,
    *others: Any,
    dcp_executor: CachedAttention | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """:func:`dcp.integrations.transformers.dcp_attention` over what is cached of this layer."""
    if dcp_executor is None:
        raise ValueError(f'attention "{NAME}" needs the model called by an InferenceEngine')
    layer = Layer(dcp_executor, module.layer_idx)
    asked = attention_mask if isinstance(attention_mask, Asked) else None
    layer.check(module, asked_of(module, asked, sliding_window, is_causal))
    return dcp_attention(
        module, query, key, value, attention_mask, *others, dcp_executor=layer, **keywords
    )


def use_cached_attention(
    model: Any, *, tensor_parallel: int = 1
) -> tuple[AttentionSpec, list[Reach]]:
    """Let the layers of ``model`` call :func:`cached_attention`; returns what they compute, and how
    far back each of them sees. ``tensor_parallel``: ranks that share the weights of ``model``.

    Raises ``ValueError`` for a model that dcp attention cannot serve, and for one whose keys and
    values have two widths.
    """
    from transformers import AttentionInterface

    register_attention()
    asked = attention_of(model, chunks=True, tensor_parallel=tensor_parallel)
    if asked.spec.value_dim != asked.spec.head_dim:
        raise ValueError(
            f"{type(model).__name__} has latent attention, of keys and values of two widths, which "
            "the cache does not hold: train it with dcp, serve it elsewhere"
        )
    model.set_attn_implementation("dcp")
    try_model(model)
    AttentionInterface.register(NAME, cached_attention)
    register_masks(NAME)
    model.set_attn_implementation(NAME)
    return asked.spec, [reach_of(asked.masks[name]) for name in asked.layers]


def last_logits(model: Any, tokens: list[list[int]], cached: CachedAttention) -> dict[int, Tensor]:
    """Run a turn that has begun; logits ``[vocab]`` after the last token of each sequence.

    Args:
        tokens: new tokens of each sequence.

    Returns them by sequence number, those whose last token this process holds. Raises
    ``ValueError`` where rotary frequencies would change with the length of the conversation.
    """
    plan = cached.plan
    assert plan is not None
    limit = rotary_limit(model.config.get_text_config())
    if limit is not None and cached.longest > limit:
        raise ValueError(
            f"a conversation of {cached.longest} tokens is beyond {limit}, from which on the "
            "rotary frequencies of this model depend on its length: cached keys would not fit"
        )
    counts = np.array([len(of) for of in tokens])
    ends = np.cumsum(counts)
    every = np.stack([np.concatenate(tokens).astype(np.int64), runs(cached.num_cached, counts)])
    mine = np.arange(ends[-1]) if cached.is_local else plan.token_indices(cached.caches[0].rank)
    kept = np.flatnonzero(np.isin(mine, ends - 1))
    device = cached.caches[0].pools[0].device
    ids, positions = torch.from_numpy(every[:, mine]).to(device)
    index = torch.from_numpy(kept).to(device)
    with torch.no_grad():
        logits = local_logits(model, ids, positions, cached, logits_to_keep=index, use_cache=False)
    sequences = np.searchsorted(ends - 1, mine[kept]).tolist()
    return dict(zip(sequences, logits, strict=True))


def open_model(
    path: str | None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    tensor_group: DeviceMesh | None = None,
    **sizes: int,
) -> Any:
    """A model from a local folder (nothing is downloaded); without one, a tiny Llama over bytes.

    Args:
        seed: of the tiny model's random weights.
        tensor_group: ranks that share its weights: the device holds this rank's part of them alone.
            The host holds all of them until then.
        sizes: of the tiny model, see :func:`tiny_config`.

    Raises ``ValueError`` for a folder that holds no causal language model, and as
    :func:`dcp.inference.weights.share_weights` does.
    """
    from transformers import AutoModelForCausalLM

    if path is None:
        config = tiny_config(**sizes)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    elif not Path(path).is_dir():
        raise ValueError(f"model {path!r} is no folder on this machine")
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), local_files_only=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"model {path!r} cannot be loaded: {reason}") from None
    if tensor_group is not None:
        share_weights(model, tensor_group)
    return model.eval().to(device)


def tiny_config(
    *, hidden_size: int = 64, num_layers: int = 2, num_heads: int = 8, num_kv_heads: int = 2
) -> Any:
    """A Llama over bytes (258 tokens: each byte, begin, end)."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=258,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=1 << 20,
        bos_token_id=256,
        eos_token_id=257,
    )
