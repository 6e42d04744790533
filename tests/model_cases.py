"""Small Hugging Face models, the same in every process, tokens for them, and their logits."""

import torch
import transformers

from dcp import AttentionExecutor, AttentionSpec, Cluster, SequenceBatch, plan
from dcp.integrations.transformers import attention_of, local_logits, register_attention

WINDOW = 5
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT = {  # attention of DeepSeek's kind, with values of a width of their own
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}


def make_config(implementation, kind=transformers.LlamaConfig, **others):
    register_attention()
    return kind(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_cache=False,
        attn_implementation=implementation,
        **others,
    )


def make_model(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def make_tokens(seqlens):
    return torch.randint(0, 50, (sum(seqlens),), generator=torch.Generator().manual_seed(1))


def make_tiny(kind, **others):
    """A tiny model of an architecture, with its own attention, and the sizes that it has."""
    register_attention()
    config_kind = getattr(transformers, f"{kind}Config")
    known = config_kind()
    sizes = {
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rotary_dim": 8,
        "layer_types": None,
        "sliding_window": WINDOW,
        "n_embd": 32,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "dff": 48,
        "query_pre_attn_scalar": 8,
        **EXPERTS,
    }
    fixed = {name for name in sizes if isinstance(getattr(config_kind, name, None), property)}
    values = {n: value for n, value in sizes.items() if hasattr(known, n) and n not in fixed}
    values |= {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    if hasattr(config_kind, "layers_block_type"):  # made from other fields
        values.pop("layer_types", None)
    values |= {"bos_token_id": 1, "eos_token_id": 2}
    return make_model(config_kind(**values | others)).eval()


def make_executor(seqlens, asked=None):
    """An executor of one process, prepared for what a model asks of attention; without that, for
    causal attention of the heads that the small models here have."""
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
    batch = SequenceBatch(seqlens)
    if asked is not None:
        spec, batch = asked.spec, SequenceBatch(seqlens, asked.masks, weights=asked.weights)
    executor = AttentionExecutor()
    executor.prepare(plan(batch, spec, Cluster(devices_per_node=1)))
    return executor


class Recorder:
    """An executor that keeps the mask of each call."""

    def __init__(self, executor):
        self.executor, self.plan, self.masks = executor, executor.plan, []

    def attention(self, *tensors, mask=None, **others):
        self.masks.append(mask)
        return self.executor.attention(*tensors, mask=mask, **others)


def relative_error(model, seqlens=(12, 7)):
    """Largest difference between a model's logits with planned attention, as it is described, and
    with its own over each document, relative to the greatest. Each mask must have been used by as
    many layers as described."""
    asked, tokens = attention_of(model), make_tokens(seqlens)
    positions = torch.cat([torch.arange(seqlen) for seqlen in seqlens])
    recorder = Recorder(make_executor(seqlens, asked))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = torch.cat([model(input_ids=of[None]).logits[0] for of in tokens.split(seqlens)])
        model.set_attn_implementation("dcp")
        found = local_logits(model, tokens, positions, recorder, **asked.keywords)
    assert {name: recorder.masks.count(name) for name in set(recorder.masks)} == asked.weights
    return float((found - wanted).abs().max() / wanted.abs().max())
