"""The text workload: the Llama of ``dcp train`` on its documents, shared out by Ulysses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from dcp.data.samples import IGNORED, SampleFormat
from dcp.datacentric.buckets import Bucket, text_buckets
from dcp.datacentric.config import TextConfig
from dcp.datacentric.sequence_group import SequenceGroup
from dcp.train.model import build_llama, open_dataset, summed_loss

NAME = "dcp_group"


@dataclass(frozen=True)
class TextBatch:
    """Packed documents: tokens and labels (already shifted) ``[tokens]``, and the lengths."""

    tokens: Tensor
    labels: Tensor
    lengths: list[int]


class TextWorkload:
    """Documents, cut at ``max_seqlen``, in buckets of powers of two; attention is causal.

    The loss is a mean over all tokens that have a label.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        AttentionInterface.register(NAME, group_attention)
        self.config, self.device = config, torch.device(device)
        self._dataset, self._vocab_size = open_dataset(config)
        longest, lengths = config.max_seqlen, self._dataset.lengths
        if not len(lengths):
            raise ValueError(f"source {config.source!r} has no documents")
        if config.over_long == "raise" and lengths.max() > longest:
            raise ValueError(
                f"document {int(lengths.argmax())} has {lengths.max()} tokens, more than "
                f"max_seqlen={longest}: raise it or set over_long='split'"
            )
        self._pieces = [
            (document, start, min(start + longest, length))
            for document, length in enumerate(lengths.tolist())
            for start in range(0, max(length, 1), longest)
        ]
        self.buckets = text_buckets(longest)
        at = np.searchsorted(
            [b.size for b in self.buckets], [stop - start for _, start, stop in self._pieces]
        )
        self.bucket_of = [self.buckets[index].name for index in at.tolist()]
        self.depth = {"layer": config.num_layers}
        shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        self.identity = {
            "kind": "llama",
            **{name: getattr(config, name) for name in shape},
            "vocab_size": self._vocab_size,
            "dtype": config.dtype,
            "buckets": {bucket.name: list(bucket.shape) for bucket in self.buckets},
        }

    def build(self, depth: int | None = None) -> nn.Module:
        config = self.config if depth is None else replace(self.config, num_layers=depth)
        model: Any = build_llama(
            config,
            seed=config.seed,
            vocab_size=self._vocab_size,
            max_positions=config.max_seqlen,
            attention=NAME,
            device=self.device,
        )
        # transformers 5 renamed it on the way
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        return model

    def layers(self, model: nn.Module) -> dict[str, list[Any]]:
        inner: Any = model
        return {"layer": list(inner.model.layers)}

    def load(self, samples: Sequence[int], epoch: int) -> TextBatch:
        tokens, labels, lengths = [], [], []
        for sample in samples:
            document, start, stop = self._pieces[sample]
            whole = SampleFormat().read(self._dataset[document], document)
            tokens.append(whole.tokens[start:stop])
            labels.append(whole.labels[start:stop])
            lengths.append(stop - start)
        return TextBatch(self._tensor(tokens), self._tensor(labels), lengths)

    def stand_in(self, bucket: Bucket, batch_size: int) -> TextBatch:
        tokens = np.arange(bucket.size * batch_size) % self._vocab_size
        return TextBatch(self._tensor([tokens]), self._tensor([tokens]), [bucket.size] * batch_size)

    def summed_loss(self, model: nn.Module, batch: TextBatch, group: SequenceGroup) -> Tensor:
        mine = group.part(len(batch.tokens))
        tokens, labels = batch.tokens[mine], batch.labels[mine]
        positions = np.concatenate([np.arange(length) for length in batch.lengths])
        at = self._tensor([positions])[mine]
        if not len(tokens):  # models' own reshapes need a token; its logits are left out
            tokens, at = tokens.new_zeros(1), at.new_zeros(1)
        output = model(
            input_ids=tokens[None],
            position_ids=at[None],
            dcp_group=group,
            dcp_lengths=batch.lengths,
        )
        logits = output.logits[0, : len(labels)]
        if logits.dtype == torch.float64:  # the training loss is in fp32
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return summed_loss(logits, labels)

    def weight(self, samples: Sequence[int]) -> int:
        pieces = (self._pieces[sample] for sample in samples)
        return sum(self._dataset.num_loss_tokens(*piece) for piece in pieces)

    def num_tokens(self, samples: Sequence[int]) -> int:
        return sum(stop - start for _, start, stop in (self._pieces[s] for s in samples))

    def _tensor(self, arrays: list[np.ndarray]) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), dtype=torch.int64, device=self.device)


def group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    dcp_group: SequenceGroup | None = None,
    dcp_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, by heads meanwhile (Ulysses, arXiv 2309.14509).

    Args:
        query, key, value: ``[1, heads, local tokens, head_dim]``.
        dcp_group, dcp_lengths: the ranks, and the documents' lengths over all of them; given to the
            model as keywords.

    In a group of more ranks than there are KV heads, these are repeated for their query heads.
    """
    if dcp_group is None or dcp_lengths is None:
        raise ValueError(f'attention "{NAME}" needs dcp_group and dcp_lengths')
    if attention_mask is not None or dropout or sliding_window is not None:
        raise ValueError(f'attention "{NAME}" is causal inside documents, and nothing else')
    total = sum(dcp_lengths)
    part = dcp_group.part(total)
    local = part.stop - part.start
    q, k, v = (t[0].transpose(0, 1)[:local].to(value.dtype) for t in (query, key, value))
    units = k.shape[1] if dcp_group.size <= k.shape[1] else q.shape[1]
    k, v = (t.repeat_interleave(units // t.shape[1], 1)[:, :, None] for t in (k, v))
    q = q.reshape(local, units, -1, q.shape[-1])
    packed = dcp_group.switch(torch.cat([q, k, v], 2), gather=0, split=1, total=total)
    done = _documents(packed, dcp_lengths, scaling)
    out = dcp_group.switch(done, gather=1, split=0, total=units)
    out = out.reshape(local, -1, q.shape[-1])
    if query.shape[2] > local:  # the token that stands in for none
        out = torch.cat([out, out.new_zeros(1, query.shape[1], q.shape[-1])])
    return out[None], None


def _documents(packed: Tensor, lengths: list[int], scaling: float | None) -> Tensor:
    """Attention in each document: ``[tokens, units, heads + 2, head_dim]`` to its heads."""
    heads = packed.shape[2] - 2
    if not packed.numel():
        return packed[:, :, :heads]
    outs = []
    for piece in packed.split(lengths):
        q, k, v = piece.permute(1, 2, 0, 3).split([heads, 1, 1], 1)
        k, v = k.expand_as(q), v.expand_as(q)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outs.append(out.permute(2, 0, 1, 3))
    return torch.cat(outs)
