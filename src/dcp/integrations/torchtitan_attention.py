"""Planned attention as the ``inner_attention`` of torchtitan's layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torchtitan.models.common.attention import (
    FlexAttention,
    GQAttention,
    ScaledDotProductAttention,
    VarlenAttention,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.model import Attention as LatentAttention
from torchtitan.models.gpt_oss.model import Attention as SinkAttention
from torchtitan.protocols.module import Module

from dcp.batch import AttentionSpec
from dcp.program import RankPlan
from dcp.runtime.executor import BoundPlan

FULL, SLIDING = "full", "sliding"  # the plan's masks, of layers without and with a window
_INNER = VarlenAttention.Config, FlexAttention.Config, ScaledDotProductAttention.Config


@dataclass(frozen=True)
class CarriedPlan:
    """The plan of a micro-batch, which torchtitan hands to every layer as ``attention_masks``.

    Attributes:
        bound: the plan, see :meth:`dcp.AttentionExecutor.bind`.
        positions: of the rank's tokens in their sequences, int64 ``[local]``. Its length says which
            rows are tokens, also to compiled code, which must not read a number that changes.
        masks: the plan's mask by that of the layer.
    """

    bound: BoundPlan
    positions: Tensor
    masks: dict[str, str]


class PlannedAttention(Module):  # type: ignore[misc]  # of torchtitan, which has no types here
    """``inner_attention`` of a layer: the tensor-parallel rank's heads, under the carried plan."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):  # type: ignore[misc]
        window: int | None = None
        """Keys that a token sees, its own included; None: all before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mask = FULL if config.window is None else SLIDING

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: CarriedPlan,
        scale: float | None = None,
        out_transform: Callable[..., Tensor] | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of the rank's rows, ``[1, rows, heads, head_dim]`` each, over the whole batch.

        Returns ``[1, rows, heads, value_dim]``; rows beyond the rank's tokens are 0. Raises
        ``ValueError`` where no plan is carried, or outputs are changed otherwise than by sinks.
        """
        if not isinstance(attention_masks, CarriedPlan):
            raise ValueError(
                "planned attention needs the batches of PlannedDataLoader, got attention_masks of "
                f"type {type(attention_masks).__name__}: train with PlannedTrainer"
            )
        local, rows = len(attention_masks.positions), q_BLNH.shape[1]
        q, k, v = (rows_of[0, :local].to(v_BLNH.dtype) for rows_of in (q_BLNH, k_BLNH, v_BLNH))
        out = attention_masks.bound.attention(
            q.contiguous(),
            (k, v),
            mask=attention_masks.masks[self.mask],
            scale=scale,
            sink=_sink(out_transform),
        )
        return pad(out, (0, 0, 0, 0, 0, rows - local))[None]


def _sink(out_transform: Any) -> Tensor | None:
    """The sinks by which a layer means to rescale the output: gpt-oss leaves that to attention."""
    if out_transform is None:
        return None
    # not getattr(…, None), of which compiled code could not be made
    is_method = isinstance(out_transform, MethodType)
    if not is_method or out_transform.__func__ is not SinkAttention._apply_sinks:
        raise ValueError(
            f"out_transform={out_transform!r} cannot be honoured: attention knows gpt-oss's sinks "
            "only; change the output where it is used"
        )
    sinks = out_transform.__self__.sinks
    return sinks.to_local(grad_placements=sinks.placements) if isinstance(sinks, DTensor) else sinks


# ---------------------------------------------------------------------- what a model asks for


@dataclass(frozen=True)
class Asked:
    """What a model asks of attention: masks by name, the layers that use each, and the spec."""

    masks: dict[str, str]
    weights: dict[str, int]
    spec: AttentionSpec


def planned_model(model: Any) -> Any:
    """A copy of a model's configuration whose attention is planned.

    Raises ``ValueError`` for a model that is no decoder of text, or has layers that are not known.
    """
    if not isinstance(model, Decoder.Config):
        raise ValueError(f"{_name(model)} cannot be planned: use a Decoder of torchtitan")
    for name in ("mtp_layers", "vision_encoder"):
        if getattr(model, name, None):
            raise ValueError(
                f"{name} of {_name(model)} cannot be honoured: it mixes tokens outside attention; "
                "use a model without"
            )
    model = copy.deepcopy(model)
    for layer in model.layers:
        _widths(layer.attention)
        layer.attention.inner_attention = PlannedAttention.Config(window=_window(layer.attention))
    return model


def asked_of(model: Any, *, dtype: str, tensor_parallel: int) -> Asked:
    """What a model made by :func:`planned_model` asks of attention on one tensor-parallel rank.

    Raises ``ValueError`` where layers differ in their heads, or have windows of several widths.
    """
    attentions = [layer.attention for layer in model.layers]
    widths = {_widths(attention) for attention in attentions}
    windows = Counter(attention.inner_attention.window for attention in attentions)
    if len(widths) > 1 or len(windows.keys() - {None}) > 1:
        raise ValueError(
            f"layers of {_name(model)} differ in (heads, KV heads, widths) {sorted(widths)} or "
            f"windows {sorted(windows, key=str)}: a plan has one shape of heads and one window"
        )
    ((heads, kv_heads, head_dim, value_dim),) = widths
    spec = AttentionSpec(
        num_heads=heads // tensor_parallel,
        num_kv_heads=kv_heads // tensor_parallel,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
    )
    masks, weights = {}, {}
    for window, count in windows.items():
        name, mask = FULL, "causal"
        if window is not None:
            name, mask = SLIDING, f"sliding_window:window={window}"
        masks[name], weights[name] = mask, count
    return Asked(masks, weights, spec)


def is_planned(model: Any) -> bool:
    """Whether :func:`planned_model` made it."""
    inner = [getattr(layer.attention, "inner_attention", None) for layer in model.layers]
    return all(isinstance(each, PlannedAttention.Config) for each in inner)


def has_sinks(model: Any) -> bool:
    """Whether layers have sinks, which are gpt-oss's."""
    return any(type(layer.attention) is SinkAttention.Config for layer in model.layers)


def masks_of(plan: RankPlan, asked: Asked) -> dict[str, str]:
    """The plan's mask for each mask that layers ask for; one mask is meant for layers without
    windows. Raises ``ValueError`` where there is none."""
    found = {name: name for name in asked.masks if name in plan.masks}
    if len(plan.masks) == 1 and asked.masks.keys() == {FULL}:
        found = {FULL: next(iter(plan.masks))}
    if missing := asked.masks.keys() - found.keys():
        raise ValueError(
            f"the plan has masks {', '.join(plan.masks)} and none called {sorted(missing)[0]!r}, "
            "which layers ask for: return it from mask_fn, or leave mask_fn out"
        )
    return found


def _widths(attention: Any) -> tuple[int, int, int, int]:
    """Heads, KV heads, and the widths of keys and values."""
    heads: int = getattr(attention, "n_heads", 0)
    if type(attention) is LatentAttention.Config:
        width = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        return heads, heads, width, attention.v_head_dim
    if type(attention) in (GQAttention.Config, SinkAttention.Config):
        width = attention.head_dim or attention.dim // heads
        return heads, attention.n_kv_heads or heads, width, width
    raise ValueError(
        f"layers of {_name(attention)} cannot be planned: use a model of GQAttention, or the "
        "attention of gpt_oss or deepseek_v3"
    )


def _window(attention: Any) -> int | None:
    """Keys that a token of the layer sees, its own included; None: all before it."""
    inner = attention.inner_attention
    if isinstance(inner, PlannedAttention.Config):
        return inner.window
    if not isinstance(inner, _INNER):
        raise ValueError(
            f"inner_attention of type {_name(inner)} cannot be planned, for it may see other keys: "
            f"use one of {', '.join(map(_name_of, _INNER))}"
        )
    window: int | None = getattr(attention, "sliding_window_size", None)
    if isinstance(inner, VarlenAttention.Config):  # its window counts the keys before a token's own
        left, right = inner.window_size
        if right != 0 or (window is not None and window != left + 1):
            raise ValueError(
                f"window_size={inner.window_size} of {_name(attention)} cannot be honoured: "
                "give (keys before a token's own, 0)"
            )
        window = None if left < 0 else left + 1
    return window


def _name(config: Any) -> str:
    return _name_of(type(config))


def _name_of(kind: type) -> str:
    return kind.__qualname__.removesuffix(".Config")
