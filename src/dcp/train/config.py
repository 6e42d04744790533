"""The configuration of a training job: parts by topic, and the job of planned attention.

:mod:`dcp.datacentric.config` composes the data-centric jobs from the same parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dcp.batch import AttentionSpec
from dcp.masks import named_mask
from dcp.placement import get_strategy
from dcp.train.keys import Keys, key

MOST_SEED = (1 << 63) - 1
MOST_SECONDS = 1e8  # three years; more does not fit what torch counts in


@dataclass(frozen=True, kw_only=True)
class Documents(Keys):
    """Which texts are trained on."""

    source: str = key("python", "documents: 'python', a file or folder, or 'hf:NAME_OR_PATH'")
    text_field: str = key("text", "field or column that holds the text")
    split: str = key("train", "split of a Hugging Face dataset")
    max_documents: int = key(0, "use that many documents, spread evenly; 0 uses all", least=0)
    tokenizer: str = key("bytes", "'bytes' or the folder of a Hugging Face tokenizer", fixed=True)
    over_long: str = key(
        "split",
        "documents longer than max_seqlen: 'split' or 'raise'",
        one_of=("split", "raise"),
    )


@dataclass(frozen=True, kw_only=True)
class Transformer(Keys):
    """The size of a model."""

    hidden_size: int = key(128, "width of the model", least=1, fixed=True)
    num_layers: int = key(4, "layers", least=1, fixed=True)
    num_heads: int = key(4, "query heads", fixed=True)
    dtype: str = key(
        "float32",
        "dtype of the forward pass: float32 or bfloat16 (autocast)",
        one_of=("float32", "bfloat16"),
    )

    def check(self) -> None:
        super().check()
        self.require("num_heads", self.num_heads > 0, "1 or more")
        pairs = self.hidden_size % (2 * self.num_heads) == 0
        self.require("hidden_size", pairs, f"a multiple of 2 * num_heads={2 * self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class Llama(Transformer):
    """What a Llama has besides."""

    intermediate_size: int = key(
        0, "width of the MLP; 0 is 8/3 of hidden_size", least=0, fixed=True
    )
    num_kv_heads: int = key(2, "key and value heads; divides num_heads", fixed=True)

    def check(self) -> None:
        super().check()
        _ = self.spec

    @property
    def spec(self) -> AttentionSpec:
        """Heads and dtype of the model's attention."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Optimisation(Keys):
    """Steps, rates and the seed."""

    steps: int = key(60, "optimiser steps, one batch each", least=1)
    learning_rate: float = key(3e-3, "peak learning rate", above=0)
    warmup_steps: int = key(10, "steps of linear warm-up, before a cosine to a tenth", least=0)
    weight_decay: float = key(0.1, "AdamW weight decay of the matrices", least=0)
    grad_clip: float = key(1.0, "largest gradient norm; 0 does not clip", least=0)
    seed: int = key(0, "of the weights and of the order of documents", least=0, most=MOST_SEED)


@dataclass(frozen=True, kw_only=True)
class Running(Keys):
    """Where and how a job runs, and what it leaves behind."""

    device: str = key(
        "auto",
        "'cpu', 'cuda', or 'auto': cuda where every local rank has a GPU",
        one_of=("auto", "cpu", "cuda"),
    )
    threads: int = key(1, "CPU threads of each process", least=1)
    timeout_seconds: float = key(
        600.0, "how long a rank waits for another, or for a plan", above=0, most=MOST_SECONDS
    )
    output: str = key("runs/train", "folder for metrics, pictures and checkpoints")
    checkpoint_every: int = key(0, "steps between checkpoints; 0 writes one at the end", least=0)
    resume: str = key(
        "",
        "checkpoint folder to go on from; 'latest': the newest of the output folder; 'auto': that, "
        "or from the start where there is none",
    )
    progress: bool = key(True, "show a progress bar")


@dataclass(frozen=True, kw_only=True)
class JobConfig(Running, Optimisation, Transformer):
    """What every job has, of whatever kind."""


@dataclass(frozen=True, kw_only=True)
class Planning(Keys):
    """How batches are filled and attention is planned."""

    tokens_per_batch: int = key(12288, "tokens of a batch, over all ranks", least=1)
    max_seqlen: int = key(4096, "tokens of the longest sequence; 0 is tokens_per_batch", least=0)
    packing: str = key(
        "first_fit",
        "how batches are filled: 'first_fit' or 'ordered'",
        one_of=("first_fit", "ordered"),
    )
    bucket_window: int = key(
        0, "documents whose lengths are sorted together; 0 sorts none", least=0
    )
    mask: str = key("causal", "name of the attention mask", fixed=True)
    strategy: str = key("auto", "placement strategy")
    block_size: int = key(0, "most tokens of a data block; 0 lets the planner choose", least=0)
    cluster: str = key("auto", "preset or file with the machine's rates")
    look_ahead: int = key(4, "batches that each planning rank plans ahead", least=1)
    planning_workers: int = key(1, "planning processes of each planning rank", least=0)
    planning_ranks: str = key("", "ranks that plan, as 0,8; empty: the first of each node")
    planning_pool: str = key(
        "processes", "where they plan: 'processes' or 'ray'", one_of=("processes", "ray")
    )

    def check(self) -> None:
        super().check()
        ranks = all(part.strip().isdecimal() for part in self.planning_ranks.split(",") if part)
        self.require("planning_ranks", ranks, "numbers with commas between")
        named_mask(self.mask, 1)
        if self.strategy != "auto":
            get_strategy(self.strategy)
        short = self.max_seqlen <= self.tokens_per_batch
        self.require("max_seqlen", short, f"at most tokens_per_batch={self.tokens_per_batch}")


_LOADER_KEYS = (
    "tokens_per_batch", "over_long", "seed", "packing", "bucket_window", "look_ahead",
    "planning_pool", "timeout_seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JobConfig, Planning, Llama, Documents):
    """A Llama on variable-length documents, its attention planned for every batch."""

    job: ClassVar[str] = "planned"

    @property
    def plan_options(self) -> dict[str, Any]:
        """Keywords of ``dcp.plan``."""
        return {
            "strategy": self.strategy,
            "block_size": self.block_size or "auto",
            "model_width": self.hidden_size,
        }

    @property
    def loader_options(self) -> dict[str, Any]:
        """Keywords of ``DCPDataLoader`` that are keys here."""
        ranks = [int(part) for part in self.planning_ranks.split(",") if part]
        return {name: getattr(self, name) for name in _LOADER_KEYS} | {
            "max_seqlen": self.max_seqlen or None,
            "num_workers": self.planning_workers,
            "planning_ranks": ranks or None,
            "plan_options": self.plan_options,
        }
