"""What of a Megatron-Core configuration planned attention cannot honour: refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.moe.router import TopKRouter

_OVER_ROWS = "it goes by the rank's own tokens, not the batch's"
# field: what of its values is refused, and why or what to do
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "context_parallel_size": (
        lambda size: size > 1,
        "the data-parallel ranks share out the tokens: set it to 1",
    ),
    "attention_dropout": (bool, "set it to 0"),
    "calculate_per_token_loss": (
        lambda value: not value,
        "ranks have different numbers of labels: set it to True",
    ),
    "cache_mla_latents": (bool, "it is for inference: set it to False"),
    "experimental_attention_variant": (bool, "use a model of softmax attention"),
    "mtp_num_layers": (bool, "it shifts tokens that are elsewhere: set it to None"),
    "is_hybrid_model": (bool, "Mamba layers mix tokens: use a model of attention layers"),
    "window_size": (
        lambda window: window and (window[0] < 0 or window[1] != 0),
        "a planned window is (keys before a token's own, 0)",
    ),
    "qk_clip": (bool, "scores are not kept: set it to False"),
    "log_max_attention_logit": (bool, "scores are not kept: set it to False"),
    "fused_single_qkv_rope": (bool, "it counts rows: set it to False"),
    "fp8_dot_product_attention": (bool, "attention is not in fp8: set it to False"),
    "fp8_multi_head_attention": (bool, "attention is not in fp8: set it to False"),
    "cuda_graph_impl": (
        lambda kind: kind not in (None, "none"),
        "every batch has a plan of its own: set it to 'none'",
    ),
    "tp_comm_overlap": (bool, "its buffers have a fixed number of rows: set it to False"),
    "moe_expert_capacity_factor": (
        lambda value: value is not None,
        f"{_OVER_ROWS}: set it to None",
    ),
}
# kinds of moe_router_load_balancing_type
_BALANCING = {
    "sinkhorn": f"{_OVER_ROWS}; set it to 'aux_loss'",
    "seq_aux_loss": "a rank has parts of many sequences; set it to 'aux_loss'",
}


def check_config(config: Any, attention_dropout: float | None = None) -> None:
    """Raise ``ValueError`` for the first field of a ``TransformerConfig`` that attention, or the
    share of a batch that a rank has, cannot honour."""
    given = vars(config) | ({"attention_dropout": attention_dropout} if attention_dropout else {})
    for name, (refuses, remedy) in REFUSED.items():
        if name in given and refuses(given[name]):
            raise ValueError(f"{name}={given[name]!r} cannot be honoured: {remedy}")
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        raise ValueError(
            "variable_seq_lengths=False cannot be honoured by a pipeline, whose micro-batches "
            "differ in their rows: set it to True"
        )
    if (
        config.pipeline_model_parallel_size == 2
        and (config.virtual_pipeline_model_parallel_size or 1) > 1
        and not config.overlap_p2p_comm
    ):
        raise ValueError(
            "overlap_p2p_comm=False cannot be honoured by an interleaved pipeline of 2 stages: one "
            "is before and behind the other, and a batch of messages mixes up both ways; set it "
            "to True, and batch_p2p_comm to False"
        )
    if config.multi_latent_attention and config.apply_rope_fusion:
        raise ValueError(
            "apply_rope_fusion=True cannot be honoured in latent attention: it counts rows; set it "
            "to False"
        )
    if config.num_moe_experts and config.expert_model_parallel_size > 1:
        kind = config.moe_token_dispatcher_type
        if kind == "allgather":
            raise ValueError(
                f"moe_token_dispatcher_type={kind!r} cannot be honoured where experts are shared "
                "by ranks whose rows differ: set it to 'alltoall'"
            )
    kinds = config.moe_router_load_balancing_type or ()
    for kind, why in _BALANCING.items():
        if kind in ([kinds] if isinstance(kinds, str) else kinds):
            raise ValueError(f"moe_router_load_balancing_type={kind!r} cannot be honoured: {why}")


def check_model(model: Any, *, planned: bool = False) -> None:
    """Raise ``ValueError`` for a model whose positions are not those of the batch; ``planned``:
    nor have been changed to be."""
    while hasattr(model, "module"):  # DistributedDataParallel, Float16Module
        model = model.module
    kind = getattr(model, "position_embedding_type", None)
    if kind not in ("rope", "yarn", "learned_absolute", "none"):
        raise ValueError(
            f"position_embedding_type={kind!r} of {type(model).__name__} cannot be honoured: use a "
            "GPTModel with 'rope', 'yarn', 'learned_absolute' or 'none'"
        )
    if planned and any(True for _ in counting_rows(model)):
        raise ValueError(
            f"the rotary embedding of {type(model).__name__} counts rows, which are in the order "
            "of the plan: make the model with planned_positions(model)"
        )
    if planned and any(type(module) is TopKRouter for module in model.modules()):
        raise ValueError(
            f"the routers of {type(model).__name__} go by the rank's own tokens, not the batch's: "
            "make the model of a planned_spec"
        )


def counting_rows(model: Any) -> Iterator[Any]:
    """The model, or its layers of latent attention, if it has rotary embeddings that count rows."""
    for module in model.modules():
        if isinstance(getattr(module, "rotary_pos_emb", None), RotaryEmbedding):
            yield module
