"""torchtitan's debug Llama with planned attention, trained on the sources of Python's own library.

torchrun --nproc-per-node 4 -m torchtitan.train \
    --module examples.torchtitan_llama3 --config llama3_planned
"""

from dataclasses import dataclass
from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from dcp.data import ByteTokenizer, TokenDataset, open_documents
from dcp.integrations.torchtitan import PlannedDataLoader, PlannedTrainer, planned_config


class Bytes(BaseTokenizer):
    """In place of a tokenizer that would have to be downloaded."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        self.bytes = ByteTokenizer()

    def encode(self, text: str, *_: Any, **__: Any) -> list[int]:
        return self.bytes.encode(text.encode()).tolist()

    def decode(self, tokens: list[int], *_: Any, **__: Any) -> str:
        return self.bytes.decode(tokens)

    def get_vocab_size(self) -> int:
        return self.bytes.vocab_size


def documents(tokenizer: Bytes) -> TokenDataset:
    return TokenDataset(open_documents("python", limit=400), tokenizer.bytes)


def llama3_planned() -> PlannedTrainer.Config:
    config = llama3_debugmodel()
    config.tokenizer = Bytes.Config()
    config.parallelism.spmd_backend = "partial_dtensor"  # the default needs a newer torch than 2.13
    data = PlannedDataLoader.Config(
        open=documents, tokens_per_batch=8192, options={"over_long": "split"}
    )
    return planned_config(config, data)
