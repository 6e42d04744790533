"""A small Hugging Face model, the same in every process, and tokens for it."""

import torch
import transformers

from dcp.integrations.transformers import register_attention


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
