"""The documents, the model, its optimiser and its loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from dcp.data.datasets import TokenDataset
from dcp.data.samples import IGNORED
from dcp.data.sources import open_documents
from dcp.data.tokenizers import open_tokenizer
from dcp.train.config import Documents, JobConfig, Llama


def open_dataset(config: Documents) -> tuple[TokenDataset, int]:
    """The documents that the configuration names, and the size of their vocabulary."""
    tokenizer = open_tokenizer(config.tokenizer)
    documents = open_documents(
        config.source,
        text_field=config.text_field,
        split=config.split,
        limit=config.max_documents or None,
    )
    return TokenDataset(documents, tokenizer), tokenizer.vocab_size


def build_llama(
    config: Llama,
    *,
    seed: int,
    vocab_size: int,
    max_positions: int,
    attention: str,
    device: torch.device,
) -> torch.nn.Module:
    """A Llama with random weights that depend on ``seed`` alone.

    Args:
        attention: name of an attention that transformers knows.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    mlp = config.intermediate_size or (config.hidden_size * 8 // 3 + 31) // 32 * 32
    architecture = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=mlp,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.spec.head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation=attention)
    return model.to(device)


def build_optimizer(model: torch.nn.Module, config: JobConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def learning_rate(config: JobConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth. ``step`` counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over this rank's labels, in fp32; 0 (with a graph) where it has none.

    Args:
        logits: ``[local, vocab]``.
        labels: int64 ``[local]``, already shifted; -100 does not count.
    """
    return torch.nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=IGNORED, reduction="sum"
    )


def sum_over_ranks(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor by its sum over the group, in one all-reduce per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(total.view_as(tensor))
