"""The options of ``dcp train``: dataclasses that transformers' ``HfArgumentParser`` reads.

What a job trains, on what, and how attention is planned is ours; every other option is a field of
``transformers.TrainingArguments``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from dcp.checks import shown
from dcp.integrations.trainer_batches import PlanningArguments
from dcp.masks import named_mask
from dcp.placement import get_strategy

# Where weights are random, unless an option says otherwise: Trainer's own defaults are for
# fine-tuning.
FROM_SCRATCH: dict[str, Any] = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 10,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
}
OUTPUT = "runs/train"
# Least and most of what Trainer takes as it comes.
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "ddp_timeout": (1, 1e8),
    "threads": (1, 4096),
    "learning_rate": (0, 1e6),
    "weight_decay": (0, 1e6),
    "max_grad_norm": (0, 1e30),
    "num_train_epochs": (0, 1e9),
    "gradient_accumulation_steps": (1, 1e9),
}
STEPS = 60  # of a model from scratch, where neither steps nor epochs are given


def option(default: Any, text: str, **more: Any) -> Any:
    """A field: its default, and its help."""
    return HfArg(default=default, help=text.replace("%", "%%"), **more)


def require(name: str, value: Any, holds: bool, wanted: str) -> None:
    """``ValueError`` that says what an option must be, unless that ``holds``."""
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, got {shown(value)}")


def require_least(options: Any, **least: int) -> None:
    """``ValueError`` for the first of these fields that is less than its least value."""
    for name, bound in least.items():
        value = getattr(options, name)
        require(name, value, value >= bound, f"{bound} or more")


def check_run(options: Mapping[str, Any]) -> None:
    """``ValueError`` for numbers that no training has."""
    for name, value in options.items():
        if isinstance(value, float):
            require(name, value, isfinite(value), "finite")
        if name in BOUNDS and value is not None:
            least, most = BOUNDS[name]
            require(name, value, least <= value <= most, f"from {least:g} to {most:g}")
    steps = options.get("max_steps", -1)
    require("max_steps", steps, steps >= 1 or steps == -1, "1 or more, or -1 for epochs")


@dataclass
class ModelArguments:
    """Which model is trained."""

    _argument_group_name = "model"

    model: str = option(
        "llama",
        "folder of a Hugging Face model; or the name of an architecture, which is made with random "
        "weights, small where config_overrides does not say otherwise",
    )
    config_overrides: str = option(
        "", "fields of an architecture's configuration: hidden_size=256,num_hidden_layers=8"
    )
    model_dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32", "dtype of the weights; auto is that of the folder's"
    )
    tokenizer: str = option(
        "", "folder of a tokenizer, or 'bytes' (default: the model's; 'bytes' where it has none)"
    )
    lora: bool = option(False, "train low-rank adapters (with peft) instead of the weights")
    lora_rank: int = option(16, "their rank")
    lora_targets: str = option(
        "all-linear", "modules that get them: all-linear, or names with commas between"
    )

    def __post_init__(self) -> None:
        require_least(self, lora_rank=1)

    @property
    def is_folder(self) -> bool:
        """Whether the model is read from here; else it is made."""
        return Path(self.model).exists()


@dataclass
class DataArguments:
    """What it is trained on."""

    _argument_group_name = "data"

    data: str = option(
        "python",
        "'python' (this interpreter's sources); a file, folder or pattern of texts, or of JSON or "
        "Parquet with messages, prompt and completion, input_ids, or text; or 'hf:NAME_OR_PATH'",
    )
    eval_data: str = option("", "the same, to be evaluated as eval_strategy says, and at the end")
    text_field: str = option("text", "field or column that holds the text of a plain document")
    split: str = option("train", "split of a Hugging Face dataset")
    max_documents: int = option(0, "use that many, spread evenly; 0 uses all")
    assistant_only: bool = option(False, "of messages, learn what the assistant says")
    max_seqlen: int = option(4096, "tokens of the longest sequence; 0 is tokens_per_batch")
    over_long: Literal["split", "raise"] = option("split", "what a longer document does")

    def __post_init__(self) -> None:
        require_least(self, max_documents=0, max_seqlen=0)


@dataclass
class BatchArguments:
    """How batches are filled and attention is planned."""

    _argument_group_name = "planning"

    tokens_per_batch: int = option(12288, "tokens of a batch, over all ranks")
    packing: Literal["first_fit", "ordered"] = option("first_fit", "how batches are filled")
    bucket_window: int = option(0, "documents whose lengths are sorted together; 0 sorts none")
    mask: str = option("", "attention mask of every layer (default: what the model asks for)")
    strategy: str = option("auto", "placement strategy")
    block_size: int = option(0, "most tokens of a data block; 0 lets the planner choose")
    cluster: str = option("auto", "preset or file with the machine's rates")
    calibrate: bool = option(
        True, "learn the machine's rates from what ranks measure: plans differ from run to run"
    )
    look_ahead: int = option(4, "batches that each planning rank plans ahead")
    planning_workers: int = option(1, "planning processes of each planning rank")
    planning_ranks: str = option("", "ranks that plan, as 0,8 (default: the first of each node)")
    planning_pool: Literal["processes", "ray"] = option("processes", "where they plan")

    def __post_init__(self) -> None:
        require_least(self, tokens_per_batch=1, bucket_window=0, block_size=0)
        require_least(self, look_ahead=1, planning_workers=0)
        numbers = all(part.strip().isdecimal() for part in self.planning_ranks.split(",") if part)
        require("planning_ranks", self.planning_ranks, numbers, "numbers with commas between")
        if self.mask:
            named_mask(self.mask, 1)
        if self.strategy != "auto":
            get_strategy(self.strategy)

    def planning(self, data: DataArguments, cluster: Any) -> PlanningArguments:
        """As :class:`dcp.integrations.trainer.DCPTrainer` takes it."""
        longest, budget = data.max_seqlen, self.tokens_per_batch
        require("max_seqlen", longest, longest <= budget, f"at most tokens_per_batch={budget}")
        ranks = [int(part) for part in self.planning_ranks.split(",") if part]
        return PlanningArguments(
            tokens_per_batch=budget,
            mask=self.mask or None,
            strategy=self.strategy,
            block_size=self.block_size or "auto",
            look_ahead=self.look_ahead,
            num_workers=self.planning_workers,
            cluster=cluster,
            calibrate=self.calibrate,
            loader_options={
                "max_seqlen": longest or None,
                "over_long": data.over_long,
                "packing": self.packing,
                "bucket_window": self.bucket_window,
                "planning_ranks": ranks or None,
                "planning_pool": self.planning_pool,
            },
        )


@dataclass
class RunArguments(TrainingArguments):
    """Trainer's own arguments, some with other defaults, and two of ours."""

    _argument_group_name = "transformers.TrainingArguments"

    output_dir: str | None = option(
        OUTPUT,
        "folder of the model, metrics, pictures and checkpoints",
        aliases=["--output"],
    )
    logging_steps: float = option(1, "steps between two lines of metrics")
    report_to: str = option("none", "tensorboard, wandb, …: loggers besides metrics.jsonl")
    ddp_timeout: int = option(600, "seconds that a rank waits for another, or for a plan")
    threads: int = option(1, "CPU threads of each process")
