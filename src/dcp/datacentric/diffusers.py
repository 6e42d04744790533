"""Transformers of diffusers: a workload from the context-parallel plan that a model declares.

Attention goes through diffusers' own dispatcher, in which a backend of ours is registered. It is
active only while an attention module of a split model runs, and then hands whole sequences to the
backend that was.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from dcp.datacentric.exchanged import exchanged_attention
from dcp.datacentric.families import FAMILIES
from dcp.datacentric.sequence_group import SequenceGroup
from dcp.datacentric.splitting import MAIN, OTHER, Plan, SharedTokens, bound, split_tokens
from dcp.datacentric.workload import Workload

NAME: Any = "dcp_group"  # the registry takes any name, though its own are an enumeration
REMEDY = "write a Workload's three methods for it"


class DiffusersWorkload(Workload):
    """A diffusers transformer, of which ``sizes`` and ``loss`` are left to write.

    Args:
        model: its blocks recompute as the iteration has it, its attention backend is kept.
        plan: in place of the one that it declares (``_cp_plan``).
        order: of ``"hidden_states"`` and ``"encoder_hidden_states"`` in attention over both; only
            needed for a mask over both.

    Raises ``ValueError`` for a model without a plan, and for one that does more with its tokens
    than a plan can say.
    """

    def __init__(
        self,
        model: Any,
        *,
        plan: Plan | None = None,
        order: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__(model, device=device, seed=seed)
        family = FAMILIES.get(type(model).__name__)
        if family is not None:
            family.prepare(model)
            plan, order = plan or family.plan, order or family.order
        self.plan: Any = plan or getattr(model, "_cp_plan", None)
        self.order = order
        self._refuse()

    @cached_property
    def identity(self) -> dict[str, Any]:
        config = json.loads(self.model.to_json_string())
        sizes = {name: value for name, value in config.items() if not name.startswith("_")}
        return {**sizes, **super().identity}

    def build(self, depth: int | None = None) -> nn.Module:
        model = self.model
        if depth is not None:
            dropped = [layer for layers in _lists(model).values() for layer in layers[depth:]]
            model = deepcopy(model, {id(layer): None for layer in dropped})
            for kind, layers in _lists(model).items():
                setattr(model, kind, layers[:depth])
        if model._supports_gradient_checkpointing:
            model.enable_gradient_checkpointing(_recomputed)
        return model.to(self.device)

    def layers(self, model: nn.Module) -> dict[str, list[Any]]:
        if not self.model._supports_gradient_checkpointing:
            return {}
        return {kind: list(layers) for kind, layers in _lists(model).items()}

    def split(self, model: nn.Module, group: SequenceGroup) -> Sequence[RemovableHandle]:
        return split_transformer(model, self.plan, group, order=self.order)

    def _refuse(self) -> None:
        """Raise for what a plan cannot do right."""
        kind = type(self.model).__name__
        if self.plan is None:
            raise ValueError(
                f"{kind} declares no context-parallel plan (_cp_plan): give plan=, or {REMEDY}"
            )
        given = {name for what in self.plan.values() if isinstance(what, dict) for name in what}
        for name in inspect.signature(self.model.forward).parameters:
            tokens = name.endswith("hidden_states") and not name.startswith("encoder_")
            if tokens and name not in {MAIN, *given}:
                raise ValueError(f"{kind} has tokens that no plan splits, {name}: {REMEDY}")
        for name, module in self.model.named_modules():
            processor = getattr(module, "processor", None)
            inside = name.split(".")[0] in _lists(self.model)
            if inside and processor is not None and not hasattr(processor, "_parallel_config"):
                raise ValueError(
                    f"{kind}.{name} attends by {type(processor).__name__}, which knows no "
                    f"dispatcher: set_attn_processor() one that does, or {REMEDY}"
                )


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """A model's lists of layers by name."""
    children = model.named_children()
    return {name: child for name, child in children if isinstance(child, nn.ModuleList)}


def split_transformer(
    model: nn.Module, plan: Plan, group: SequenceGroup, *, order: Sequence[str] | None = None
) -> Sequence[RemovableHandle]:
    """Hooks that split a diffusers transformer by a plan, and exchange tokens in its attention.

    Args:
        plan, order: as of :class:`DiffusersWorkload`.
    """
    shared = SharedTokens(group, order)
    handles = split_tokens(model, plan, shared)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            handles += _exchange_in(module, shared)

    def check(model: nn.Module, *_: Any) -> None:
        if not shared.num_exchanges:
            raise ValueError(
                f"no attention of {type(model).__name__} went through diffusers' dispatcher, so "
                f"that tokens saw those of their own rank only: {REMEDY}"
            )

    return [*handles, model.register_forward_hook(check)]


def _recomputed(layer: Any, *inputs: Any) -> Any:
    """Diffusers' checkpointing, for each layer by itself."""
    if getattr(layer, "gradient_checkpointing", False):
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# --------------------------------------------------------------------------- attention


class _Active(str):
    """The name of our backend while an attention module runs, and what that needs to know."""

    shared: SharedTokens
    crossed: bool  # keys are of the other sequence
    before: Any  # the backend that was active
    own: Any  # the backend that the module asks for, or None


def _exchange_in(module: Any, shared: SharedTokens) -> list[RemovableHandle]:
    """Hooks that make our backend the active one while an attention module runs."""

    def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        active, processor = _Active(NAME), module.processor
        active.shared = shared
        active.crossed = bound(module, args, kwargs).arguments.get(OTHER) is not None
        active.before, _ = _AttentionBackendRegistry.get_active_backend()
        active.own = processor._attention_backend
        processor._attention_backend, processor._parallel_config = None, active
        _AttentionBackendRegistry.set_active_backend(active)

    def leave(module: Any, *_: Any) -> None:
        processor = module.processor
        active = processor._parallel_config
        if active is not None:
            processor._attention_backend, processor._parallel_config = active.own, None
            _AttentionBackendRegistry.set_active_backend(active.before)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    ]


@_AttentionBackendRegistry.register(NAME)
def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention over the tokens of a group, as diffusers' dispatcher calls it.

    Args:
        query, key, value: ``[batch, local tokens, heads, head_dim]``.
        _parallel_config: None where a module says that its keys are whole on every rank.
    """
    active, _ = _AttentionBackendRegistry.get_active_backend()
    attend = partial(
        dispatch_attention_fn,
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
        backend=active.own or active.before,
    )
    if _parallel_config is None:
        return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal)
    if dropout_p or is_causal:
        raise ValueError(
            "attention over a group of ranks has no dropout and is not causal: leave both out"
        )
    return exchanged_attention(
        query, key, value, attn_mask, attend, active.shared, crossed=active.crossed
    )
