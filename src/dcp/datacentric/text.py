"""The text workload: the model of ``dcp train`` on its documents, shared out by Ulysses."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from dcp.data.samples import IGNORED, SampleFormat
from dcp.datacentric.buckets import Bucket, text_buckets
from dcp.datacentric.sequence_group import SequenceGroup
from dcp.datacentric.workload import Workload
from dcp.train.arguments import DataArguments, ModelArguments, require
from dcp.train.model import config_of, open_model, open_texts, tokenizer_of

NAME = "dcp_group"
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class TextBatch:
    """Packed documents: tokens and labels (already shifted) ``[tokens]``, and the lengths."""

    tokens: Tensor
    labels: Tensor
    lengths: list[int]


class TextWorkload(Workload):
    """Documents, cut at ``max_seqlen``, in buckets of powers of two; attention is causal.

    The loss is a mean over all tokens that have a label.
    """

    def __init__(
        self,
        model: ModelArguments,
        data: DataArguments,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
        dtype: str = "float32",
    ) -> None:
        AttentionInterface.register(NAME, group_attention)
        super().__init__(device=device, seed=seed)
        self._model = model
        if model.lora:
            raise ValueError("--lora is for planned attention: leave it out, or --job")
        tokenizer = tokenizer_of(model)
        self._vocab_size, longest = tokenizer.vocab_size, data.max_seqlen
        require("max_seqlen", longest, longest >= 1, "1 or more in a data-centric job")
        self._dataset = open_texts(data.data, data, tokenizer)
        self._pieces = _pieces(self._dataset.lengths, longest, data.over_long)
        self.buckets = text_buckets(longest)
        at = np.searchsorted(
            [b.size for b in self.buckets], [stop - start for _, start, stop in self._pieces]
        )
        self.bucket_of = [self.buckets[index].name for index in at.tolist()]
        self._config = config_of(model, tokenizer=tokenizer, max_positions=longest)
        self.depth = {"layer": self._config.num_hidden_layers}
        self.identity = {
            "kind": self._config.model_type,
            **{name: getattr(self._config, name, None) for name in _SIZES},
            "dtype": dtype,
            "buckets": {bucket.name: list(bucket.shape) for bucket in self.buckets},
        }

    def sizes(self) -> Sequence[tuple[int, ...]]:
        return [(stop - start,) for _, start, stop in self._pieces]

    def build(self, depth: int | None = None) -> nn.Module:
        config = copy(self._config)
        if depth is not None:
            config.num_hidden_layers = depth
        torch.manual_seed(self.seed)
        model: Any = open_model(self._model, config)
        model.to(self.device)
        model.set_attn_implementation(NAME)
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
        if logits.dtype != torch.float64:  # of tests
            logits = logits.float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def weight(self, samples: Sequence[int]) -> int:
        pieces = (self._pieces[sample] for sample in samples)
        return sum(self._dataset.num_loss_tokens(*piece) for piece in pieces)

    def _tensor(self, arrays: list[np.ndarray]) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), dtype=torch.int64, device=self.device)


def _pieces(lengths: np.ndarray, longest: int, over_long: str) -> list[tuple[int, int, int]]:
    """(document, start, stop) of every sequence."""
    if not len(lengths):
        raise ValueError("the data has no documents: give files that hold some")
    if over_long == "raise" and lengths.max() > longest:
        raise ValueError(
            f"document {int(lengths.argmax())} has {lengths.max()} tokens, more than "
            f"max_seqlen={longest}: raise it or set over_long='split'"
        )
    return [
        (document, start, min(start + longest, length))
        for document, length in enumerate(lengths.tolist())
        for start in range(0, max(length, 1), longest)
    ]


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
