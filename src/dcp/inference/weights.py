"""Weights shared out over the ranks of a node, by the plan that a model of transformers brings."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def share_weights(model: Any, mesh: DeviceMesh) -> None:
    """Leave this rank its part of the weights; the ranks of ``mesh`` then compute each layer
    together, each with heads of its own.

    The parts are those of the model's ``tp_plan``, as ``tp_plan="auto"`` takes them: columns, rows
    and vocabulary, joined by one sum after attention and one after the feed-forward layer. Every
    rank of ``mesh`` calls it, with the same weights.

    Args:
        model: on the CPU, or where the whole of it has room once.
        mesh: of one axis.

    Raises ``ValueError`` for a model without such a plan for its attention, or with KV heads that
    the ranks do not divide.
    """
    from transformers.integrations.tensor_parallel import apply_tensor_parallelism

    size, kind = mesh.size(), type(model).__name__
    rules = model.tp_plan or {}
    if not any(name.endswith("self_attn.k_proj") for name in rules):
        raise ValueError(
            f"{kind} has no plan in transformers to share out the weights of its attention: serve "
            "it without tensor parallelism"
        )
    config = model.config.get_text_config()
    heads = config.num_key_value_heads
    if heads % size:
        raise ValueError(
            f"{kind} has {heads} KV heads, which {size} ranks of tensor parallelism do not divide"
        )
    apply_tensor_parallelism(model, mesh, _named(model, rules))
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a part may be a view that keeps the whole


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that this rank holds."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(each.untyped_storage().nbytes() for each in held)


def _named(model: Any, rules: dict[str, str]) -> dict[str, str]:
    """The rule of each module and of each of its own parameters, these first."""
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    named, tied = {}, {name for name, _ in model.named_parameters()}
    for name, module in model.named_modules():
        rule = rules.get(replace_layer_number_by_wildcard(name))
        for own, _ in module.named_parameters(recurse=False):
            path = f"{name}.{own}" if name else own
            of_own = rules.get(replace_layer_number_by_wildcard(path), rule)
            if of_own is not None and path in tied:  # a tied one is shared out under its first name
                named[path] = of_own
        if rule is not None:
            named[name] = rule
    return named
