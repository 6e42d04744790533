"""A model and a tokenizer of bytes that the examples make themselves: nothing is downloaded."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dcp import AttentionSpec
from dcp.data import ByteTokenizer, TokenDataset, open_documents

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", chat_template=TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


# ---------------------------------------------------------------------- of bytes, for plain loops

TOKENS = 512  # of a batch, over all ranks
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


def sources() -> TokenDataset:
    """The sources of Python's standard library."""
    return TokenDataset(open_documents("python", limit=400), ByteTokenizer())


def make_byte_model(**others: Any) -> LlamaForCausalLM:
    """The same weights wherever it is made."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ByteTokenizer().vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=SPEC.num_heads,
            num_key_value_heads=SPEC.num_kv_heads,
            use_cache=False,
            **others,
        )
    )
