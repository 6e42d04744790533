"""What a Hugging Face model's attention is to a plan: its heads, its masks, the layers of each.

::

    asked = attention_of(model)  # or of its configuration: no weights are needed
    batch = SequenceBatch(seqlens, asked.masks, weights=asked.weights)
    executor.prepare(plan(batch, asked.spec, cluster))
    logits = local_logits(model, tokens, positions, executor, **asked.keywords)

It is read from the configuration, as the models themselves read it. What a layer really asks for is
compared with the plan when the model runs, see :mod:`dcp.integrations.model_masks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dcp.batch import AttentionSpec
from dcp.checks import shown, whole
from dcp.integrations.model_checks import OWN_TABLES, check_model, inner_model

FULL, SLIDING, CHUNKED = "full", "sliding", "chunked"
_KEYWORDS = {FULL: "dcp_mask", SLIDING: "dcp_sliding_mask"}
_MASKS = {"full_attention": FULL, "attention": FULL, "sliding_attention": SLIDING}
_OWN_MASK = "plan a mask of your own for it and give dcp_any_mask=True"
#: Kinds whose masks show later tokens inside images or a prompt, wherever those are in the batch.
_PREFIXED = {
    "deepseek_ocr2",
    "diffusion_gemma",
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "git",
    "hrm_text",
    "molmo2",
    "paligemma",
    "pi0",
}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What a model asks of attention, in the words of :class:`~dcp.SequenceBatch` and a plan.

    Attributes:
        spec: heads, widths and dtype of one layer, on one rank of tensor parallelism.
        masks: names for mask expressions, ``{"full": "causal", "sliding":
            "sliding_window:window=1024"}``; only those that a layer uses.
        weights: layers that use each mask, by the same names.
        layers: the name of each layer's mask.
        keywords: of :func:`~dcp.integrations.transformers.local_logits` or the model, which say
            the mask of a layer: ``dcp_mask`` and ``dcp_sliding_mask``.
    """

    spec: AttentionSpec
    masks: dict[str, str]
    weights: dict[str, int]
    layers: tuple[str, ...]
    keywords: dict[str, Any]


def attention_of(
    model_or_config: torch.nn.Module | PreTrainedConfig,
    *,
    tensor_parallel: int = 1,
    dtype: str | torch.dtype | None = None,
    chunks: bool = False,
) -> Attention:
    """What ``model_or_config`` asks of attention.

    Args:
        model_or_config: a model of transformers, wrapped by torch or not, or its configuration.
        tensor_parallel: ranks that share the heads of each layer. Fewer KV heads than that are
            held by several ranks, one each.
        dtype: of queries, keys and values. Without it that of the model, or the one its
            configuration names; a configuration that names none gets torch's default, as a model
            made from it would. Autocast computes in another: give it then.
        chunks: describe layers of chunked attention, too: ``"chunked:chunk=8192"``. That is no name
            of a batch's mask, but the inference engine honours it.

    Raises ``ValueError`` for what is neither of both; for a model that dcp cannot serve
    (:func:`~dcp.integrations.model_checks.check_model`); and for attention that has no plan by
    name: of encoders and encoder-decoders, none at all, in chunks, with prefixes or images that see
    later tokens, beside layers that mix tokens otherwise, of heads that differ between layers or
    that ``tensor_parallel`` does not divide.
    """
    outer, config = _configs(model_or_config)
    kind = type(outer).__name__.removesuffix("Config")
    _check_kind(kind, outer, config)
    layers = _layers(kind, config, chunks=chunks)
    if isinstance(model_or_config, torch.nn.Module):
        check_model(model_or_config)
        dtype = dtype or _dtype_of(model_or_config)
    for each in (config, outer):  # the part that reads text may name none
        dtype = dtype or each.dtype
    spec = _spec(kind, config, dtype or torch.get_default_dtype(), tensor_parallel)
    weights = {name: layers.count(name) for name in (FULL, SLIDING, CHUNKED) if name in layers}
    return Attention(
        spec=spec,
        masks={name: _mask(name, kind, config) for name in weights},
        weights=weights,
        layers=tuple(layers),
        keywords={_KEYWORDS[name]: name for name in weights if name in _KEYWORDS},
    )


def _configs(given: Any) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The whole configuration, and that of the layers that read text."""
    config = given
    if isinstance(given, torch.nn.Module):
        config = getattr(inner_model(given), "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"attention_of takes a model of transformers or its configuration, got {shown(given)}: "
            "describe other models with an AttentionSpec"
        )
    if config.is_encoder_decoder:  # of which no part is the one that reads text
        return config, config
    return config, config.get_text_config()


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    parameters = inner_model(model).parameters()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())


# ---------------------------------------------------------------------- what has no plan by name


def _check_kind(kind: str, outer: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Raise ``ValueError`` for a kind of model whose attention cannot be described."""
    if outer.is_encoder_decoder or config.is_encoder_decoder:
        raise ValueError(
            f"{kind} is an encoder-decoder (is_encoder_decoder=True), whose attentions run between "
            "two sequences: use a decoder-only model"
        )
    if config.model_type in OWN_TABLES:
        raise ValueError(
            f"{kind} (model_type={config.model_type!r}) does not use the attention registry of "
            "transformers: use a model that does"
        )
    _check_causal(kind, outer, config)
    sparse = [name for name in ("index_topk", "index_topk_blocks") if _has(config, name)]
    if sparse:
        raise ValueError(
            f"{kind} selects keys by what they hold ({sparse[0]}={getattr(config, sparse[0])}): "
            "use a model without sparse selection of keys"
        )


def _check_causal(kind: str, outer: PreTrainedConfig, config: PreTrainedConfig) -> None:
    for name, usual in (("use_bidirectional_attention", False), ("is_causal", True)):
        value = getattr(config, name, usual)
        if value is not None and value != usual:
            raise ValueError(f"{kind} sees later tokens ({name}={value!r}): {_OWN_MASK}")
    if outer.model_type in _PREFIXED:
        raise ValueError(
            f"{kind} (model_type={outer.model_type!r}) sees later tokens where the batch has "
            f"images or a prefix: {_OWN_MASK}; without images, describe its get_text_config()"
        )
    if not _has(config, "vocab_size"):
        raise ValueError(f"{kind} has no vocab_size, so it reads no text: {_OWN_MASK}")
    # Many kinds have is_decoder, some causal ones, too, which do not read it.
    encodes = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encodes and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"{kind} (model_type={config.model_type!r}) is an encoder, whose tokens see later "
            'ones: plan the mask "full", or set is_decoder=True where it has that'
        )


def _has(config: PreTrainedConfig, name: str) -> bool:
    return getattr(config, name, None) is not None


# ---------------------------------------------------------------------- layers and their masks


def _layers(kind: str, config: PreTrainedConfig, *, chunks: bool) -> list[str]:
    """The name of each layer's mask."""
    count = _size(kind, config, "num_hidden_layers")
    types = _layer_types(config)
    if types is None:
        return [SLIDING if _window(config) is not None else FULL] * count
    types = list(types)[:count]
    if len(types) != count:
        raise ValueError(
            f"{kind} has {len(types)} layer_types for num_hidden_layers={count}: give one a layer"
        )
    known = _MASKS | ({"chunked_attention": CHUNKED} if chunks else {})
    others = sorted(set(types) - set(known))
    if "chunked_attention" in others:
        size = getattr(config, "attention_chunk_size", None)
        raise ValueError(
            f"{kind} has layers of chunked_attention (attention_chunk_size={size}): {_OWN_MASK}"
        )
    if others:
        raise ValueError(
            f"{kind} has layers of {', '.join(others)}: dcp shares out tokens that meet in full "
            "or sliding attention alone, use a model with no other layers"
        )
    return [known[each] for each in types]


def _layer_types(config: PreTrainedConfig) -> Any:
    """The kind of each layer, as transformers writes it; None where the kind knows no such list.

    Some files have a list that their kind does not read (Mistral): all its layers are alike.
    """
    own = not type(config).__module__.startswith("transformers.")
    name = "layer_types"
    known = hasattr(type(config), name) or name in (type(config).attribute_map or {})
    return getattr(config, name, None) if own or known else None


def _window(config: PreTrainedConfig) -> Any:
    """``sliding_window``, unless another field switches it off."""
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def _mask(name: str, kind: str, config: PreTrainedConfig) -> str:
    """The mask of the layers called ``name``; a window counts a token's own key, as a model's."""
    if name == FULL:
        return "causal"
    field = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}[name]
    try:
        size = whole(field, getattr(config, field, None), least=1)
    except ValueError as error:
        raise ValueError(f"{kind} has layers of {name} attention, and {error}") from None
    return f"sliding_window:window={size}" if name == SLIDING else f"chunked:chunk={size}"


# ---------------------------------------------------------------------- heads


def _spec(kind: str, config: PreTrainedConfig, dtype: Any, tensor_parallel: int) -> AttentionSpec:
    ranks = whole("tensor_parallel", tensor_parallel, least=1)
    _check_alike(kind, config)
    heads = _size(kind, config, "num_attention_heads")
    head_dim, value_dim, kv_heads = _widths(kind, config, heads)
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{kind} has num_attention_heads={heads}, num_key_value_heads={kv_heads}, which "
            f"tensor_parallel={ranks} does not share out evenly: give one that divides both, or a "
            "multiple of the KV heads that divides the heads"
        )
    try:
        return AttentionSpec(
            num_heads=heads // ranks,
            num_kv_heads=max(kv_heads // ranks, 1),
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=str(dtype),
        )
    except ValueError as error:
        raise ValueError(f"{kind} cannot be planned: {error}") from None


def _check_alike(kind: str, config: PreTrainedConfig) -> None:
    """Raise ``ValueError`` where layers differ in their heads or the widths of those."""
    each = getattr(config, "num_attention_heads_per_layer", None) or [0]
    for name, differ in {
        "per_layer_config": getattr(config, "is_heterogeneous", False),
        "swa_head_dim": _has(config, "swa_head_dim"),
        "num_attention_heads_per_layer": len(set(each)) > 1,
    }.items():
        if differ:
            raise ValueError(
                f"{kind} has layers with heads of their own ({name}), and a plan is of one size: "
                "use a model whose layers have the same heads"
            )


def _widths(kind: str, config: PreTrainedConfig, heads: int) -> tuple[int, int, int]:
    """Width of a head's keys and of its values, and the number of KV heads."""
    if _has(config, "kv_lora_rank"):  # latents are one head; attention sees them expanded to all
        rotated = _size(kind, config, "qk_rope_head_dim")
        key = rotated + _size(kind, config, "qk_nope_head_dim")
        return key, _size(kind, config, "v_head_dim"), heads
    kv_heads = heads
    if _has(config, "num_key_value_heads"):
        kv_heads = _size(kind, config, "num_key_value_heads")
    if _has(config, "head_dim"):
        width = _size(kind, config, "head_dim")
    else:
        width = _size(kind, config, "hidden_size") // heads
    return width, width, kv_heads


def _size(kind: str, config: PreTrainedConfig, name: str) -> int:
    if not _has(config, name):
        raise ValueError(
            f"{kind} has no {name}: dcp plans attention, describe it with an AttentionSpec if it "
            "has any"
        )
    try:
        return whole(name, getattr(config, name), least=1)
    except ValueError as error:
        raise ValueError(f"{kind} cannot be planned: {error}") from None
