"""Planned attention as a part of Megatron-Core's layers, under the plan of each micro-batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import pad

from dcp.integrations.megatron_checks import check_config, check_model, counting_rows
from dcp.integrations.megatron_router import PlannedRouter
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor
from dcp.runtime.executor import BoundPlan

FULL, SLIDING = "full", "sliding"  # the plan's masks, of layers without and with a window


@dataclass
class PlannedSeqParams(PackedSeqParams):
    """The plan of a micro-batch, which Megatron hands to every layer as ``packed_seq_params``.

    Attributes:
        bound: the plan, see :meth:`dcp.AttentionExecutor.bind`.
        positions: of each row in its sequence, int64 ``[rows]``; rows that fill up have 0.
    """

    bound: BoundPlan | None = None
    positions: Tensor | None = None


def planned_spec(spec: Any, *, softcap: float | None = None) -> Any:
    """A copy of a layer specification, or of a block of several, whose attention is planned, and
    whose experts' routers count the tokens of all ranks.

    Args:
        spec: ``ModuleSpec`` of a transformer layer, local or Transformer Engine's, or
            ``TransformerBlockSubmodules``.
        softcap: scores become ``softcap * tanh(scores / softcap)``; Megatron's configuration has
            no such field.

    Raises ``ValueError`` for layers that mix tokens otherwise than by self-attention, and for other
    routers than Megatron's own.
    """
    spec = copy.deepcopy(spec)
    for layer in getattr(spec, "layer_specs", None) or [spec]:
        attention = getattr(layer.submodules, "self_attention", None)
        inner: Any = getattr(attention, "submodules", None)
        if not hasattr(inner, "core_attention"):
            module = layer.module if attention is None else getattr(attention, "module", attention)
            name = getattr(module, "__name__", module)
            raise ValueError(
                f"{name} has no core_attention to be planned, and its tokens meet elsewhere (as in "
                "Mamba or linear attention): use layers of self-attention"
            )
        inner.core_attention = planned_core_attention(softcap=softcap)
        _plan_router(getattr(layer.submodules, "mlp", None))
    return spec


def _plan_router(mlp: Any) -> None:
    if getattr(mlp, "module", getattr(mlp, "func", None)) is not MoELayer:
        return
    experts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    if experts.router is not TopKRouter:
        raise ValueError(
            f"the router {getattr(experts.router, '__name__', experts.router)} may go by the "
            "rank's own tokens, not the batch's: use Megatron's TopKRouter"
        )
    experts.router = PlannedRouter


def planned_core_attention(
    executor: AttentionExecutor | None = None, *, softcap: float | None = None
) -> ModuleSpec:
    """Planned attention as a ``core_attention`` of any layer specification.

    Args:
        executor: gives the plan, the one it has prepared, where none comes with
            ``packed_seq_params``: for models that are called without :func:`planned_batches` and do
            not repeat forward passes. Positions of tokens are then the caller's affair.
        softcap: see :func:`planned_spec`.
    """
    return ModuleSpec(PlannedCoreAttention, params={"executor": executor, "softcap": softcap})


class PlannedCoreAttention(DotProductAttention):
    """``core_attention`` of a layer: the tensor-parallel rank's heads, under the plan that
    ``packed_seq_params`` carries.

    Scale, window and sinks (``softmax_type``) are those that Megatron's own attention reads from
    the configuration, and so are the names of parameters in checkpoints.

    Raises ``ValueError`` for what a plan cannot honour.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *args: Any,
        executor: AttentionExecutor | None = None,
        softcap: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_config(config, kwargs.get("attention_dropout"))
        super().__init__(config, layer_number, *args, **kwargs)
        if self.attention_type != "self" or self.attn_mask_type not in (
            AttnMaskType.causal,
            AttnMaskType.padding_causal,
        ):
            raise ValueError(
                f"layer {layer_number} asks for {self.attention_type}-attention with "
                f"{self.attn_mask_type}: planned is self-attention that is causal by the "
                "specification (AttnMaskType.causal); other masks are named to planned_data"
            )
        self.executor, self.softcap = executor, softcap
        softmax = self.scale_mask_softmax
        self.window = softmax.window_size
        # Where query and key are scaled down by the layer's number, its softmax scales up again.
        self.scale = self.softmax_scale * (softmax.scale or 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of the rank's rows, ``[rows, 1, heads, head_dim]`` each, over the whole batch;
        latent attention leaves the 1 out, and its values have another width.

        Returns ``[rows, 1, heads * head_dim]``; rows beyond the rank's tokens are 0. Raises
        ``ValueError`` where no plan is carried, or mask or biases are.
        """
        bound, rows = self._bound(packed_seq_params), len(query)
        if attention_mask is not None or attention_bias is not None:
            name = "attention_bias" if attention_mask is None else "attention_mask"
            raise ValueError(f"{name} cannot be honoured: pass None, masks belong to the plan")
        local = bound.plan.num_local_tokens
        q, k, v = (rows_of[:local].flatten(0, -3) for rows_of in (query, key, value))
        out = bound.attention(
            q.contiguous(),
            (k, v),
            mask=_mask_of(bound.plan, self.window),
            scale=self.scale,
            softcap=self.softcap,
            sink=self.softmax_offset,
        )
        return pad(out.flatten(1), (0, 0, 0, rows - local))[:, None]

    def _bound(self, params: Any) -> BoundPlan:
        if params is None and self.executor is not None:
            return self.executor.bound()
        bound = _planned(params).bound
        assert bound is not None
        return bound


def _planned(params: Any) -> PlannedSeqParams:
    if not isinstance(params, PlannedSeqParams):
        raise ValueError(
            "planned attention needs the packed_seq_params of planned_batches, got "
            f"{type(params).__name__}: use planned_forward_step"
        )
    return params


def _mask_of(plan: RankPlan, window: Any) -> str:
    """The plan's mask for a layer with that window, or without one."""
    name = SLIDING if window else FULL
    if name in plan.masks:
        return name
    if window or len(plan.masks) > 1:
        raise ValueError(
            f"the plan has masks {', '.join(plan.masks)} and none for layers with "
            f"window_size={window}: return one called {name!r} from mask_fn, or leave mask_fn out"
        )
    return next(iter(plan.masks))


def planned_positions(model: Any) -> Any:
    """``model``, its rotary embeddings changed to go by the positions of a micro-batch's tokens.

    Args:
        model: a ``GPTModel``, or the part of one that is a stage, before it is wrapped. Embeddings
            may be scaled, as llama 3's and YaRN's are.

    Raises ``ValueError`` for position embeddings that count rows.
    """
    check_model(model)
    for module in counting_rows(model):
        # the rows of latent attention have one dim less
        latent = module is not model
        module.rotary_pos_emb = _PlannedRotary(module.rotary_pos_emb, num_dims=2 if latent else 3)
    return model


class _PlannedRotary(torch.nn.Module):
    """Takes the place of a ``RotaryEmbedding``, whose angles it uses.

    The "length" that the model asks for and hands back is the tensor of positions.
    """

    def __init__(self, rotary: RotaryEmbedding, *, num_dims: int) -> None:
        super().__init__()
        self.rotary, self.num_dims = rotary, num_dims

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        positions = _planned(packed_seq_params).positions
        assert positions is not None
        return positions

    def forward(self, positions: Tensor, **_: Any) -> Tensor | tuple[Tensor, float]:
        """Angles ``[rows, 1 …, rotated dimensions]``, with YaRN's factor where it is YaRN."""
        found = self.rotary.get_emb(1, 1)  # those of position 1: they grow with the position
        first, *factor = found if isinstance(found, tuple) else (found,)
        steps = positions.to(first.device, first.dtype).view(-1, *[1] * self.num_dims)
        angles = steps * first.view(-1)
        return (angles, *factor) if factor else angles
