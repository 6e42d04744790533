"""The configuration of a training job: one dataclass, one file, one option per key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from dcp.batch import AttentionSpec
from dcp.masks import named_mask
from dcp.placement import get_strategy
from dcp.train.data_centric import DOCUMENTS, PLANNED, PRESETS, VIDEO, DataCentricKeys
from dcp.train.data_centric import key as _key

_POSITIVE = ("tokens_per_batch", "hidden_size", "num_layers", "steps", "look_ahead", "threads")
_NOT_NEGATIVE = (
    "max_documents",
    "max_seqlen",
    "intermediate_size",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "seed",
    "block_size",
    "planning_workers",
    "bucket_window",
    "checkpoint_every",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataCentricKeys):
    """Everything a training job depends on; each field is a config key and a ``--option``."""

    # data
    source: str = _key(
        "python", "documents: 'python', a file or folder, or 'hf:NAME_OR_PATH'", DOCUMENTS
    )
    text_field: str = _key("text", "field or column that holds the text", DOCUMENTS)
    split: str = _key("train", "split of a Hugging Face dataset", DOCUMENTS)
    max_documents: int = _key(0, "use that many documents, spread evenly; 0 uses all", DOCUMENTS)
    tokenizer: str = _key("bytes", "'bytes' or the folder of a Hugging Face tokenizer", DOCUMENTS)
    tokens_per_batch: int = _key(12288, "tokens of a batch, over all ranks", DOCUMENTS)
    max_seqlen: int = _key(4096, "tokens of the longest sequence; 0 is tokens_per_batch", DOCUMENTS)
    over_long: str = _key("split", "documents longer than that: 'split' or 'raise'", DOCUMENTS)
    packing: str = _key("first_fit", "how batches are filled: 'first_fit' or 'ordered'", (PLANNED,))
    bucket_window: int = _key(
        0, "documents whose lengths are sorted together; 0 sorts none", (PLANNED,)
    )
    mask: str = _key("causal", "name of the attention mask")

    # model
    hidden_size: int = _key(128, "width of the model")
    intermediate_size: int = _key(0, "width of the MLP; 0 is 8/3 of hidden_size", DOCUMENTS)
    num_layers: int = _key(4, "layers")
    num_heads: int = _key(4, "query heads")
    num_kv_heads: int = _key(2, "key and value heads; divides num_heads", DOCUMENTS)
    dtype: str = _key("float32", "dtype of the forward pass: float32 or bfloat16 (autocast)")

    # optimisation
    steps: int = _key(60, "optimiser steps, one batch each")
    learning_rate: float = _key(3e-3, "peak learning rate")
    warmup_steps: int = _key(10, "steps of linear warm-up, before a cosine to a tenth")
    weight_decay: float = _key(0.1, "AdamW weight decay of the matrices")
    grad_clip: float = _key(1.0, "largest gradient norm; 0 does not clip")
    seed: int = _key(0, "of the weights and of the order of documents")

    # planning
    strategy: str = _key("auto", "placement strategy", (PLANNED,))
    block_size: int = _key(0, "most tokens of a data block; 0 lets the planner choose", (PLANNED,))
    cluster: str = _key("auto", "preset or file with the machine's rates", (PLANNED,))
    look_ahead: int = _key(4, "batches that each planning rank plans ahead", (PLANNED,))
    planning_workers: int = _key(1, "planning processes of each planning rank", (PLANNED,))
    planning_ranks: str = _key(
        "", "ranks that plan, as 0,8; empty: the first of each node", (PLANNED,)
    )
    planning_pool: str = _key("processes", "where they plan: 'processes' or 'ray'", (PLANNED,))

    # running
    device: str = _key("auto", "'cpu', 'cuda', or 'auto': cuda where every local rank has a GPU")
    threads: int = _key(1, "CPU threads of each process")
    timeout_seconds: float = _key(600.0, "how long a rank waits for another, or for a plan")
    output: str = _key("runs/train", "folder for metrics, pictures and checkpoints")
    checkpoint_every: int = _key(0, "steps between checkpoints; 0 writes one at the end")
    resume: str = _key("", "checkpoint folder to go on from, or 'latest' of the output folder")
    progress: bool = _key(True, "show a progress bar")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _POSITIVE:
            self._require(name, getattr(self, name) > 0, "1 or more")
        for name in _NOT_NEGATIVE:
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "timeout_seconds"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        self._require("over_long", self.over_long in ("split", "raise"), "'split' or 'raise'")
        self._require("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        self._require("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        packing = self.packing in ("first_fit", "ordered")
        self._require("packing", packing, "'first_fit' or 'ordered'")
        pool = self.planning_pool in ("processes", "ray")
        self._require("planning_pool", pool, "'processes' or 'ray'")
        ranks = all(part.strip().isdecimal() for part in self.planning_ranks.split(",") if part)
        self._require("planning_ranks", ranks, "numbers with commas between")
        heads = self.hidden_size % (2 * self.num_heads) == 0 if self.num_heads > 0 else True
        self._require("hidden_size", heads, f"a multiple of 2 * num_heads={2 * self.num_heads}")
        named_mask(self.mask, 1)
        if self.strategy != "auto":
            get_strategy(self.strategy)
        if self.job != VIDEO:
            _ = self.spec
        if self.is_data_centric:
            self._require("mask", self.mask == "causal", "causal in data-centric jobs")
            if self.max_seqlen:
                where = "in a data-centric job with a max_seqlen: memory bounds batches"
                self._require_default("tokens_per_batch", where, "set max_batch_size")
        else:
            short = self.max_seqlen <= self.tokens_per_batch
            self._require("max_seqlen", short, f"at most tokens_per_batch={self.tokens_per_batch}")

    @property
    def spec(self) -> AttentionSpec:
        """Heads and dtype of the model's attention."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // max(self.num_heads, 1),
            dtype=self.dtype,
        )

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
        """Keywords of ``DCPDataLoader`` that are keys of the same meaning."""
        ranks = [int(part) for part in self.planning_ranks.split(",") if part]
        return {
            "tokens_per_batch": self.tokens_per_batch,
            "max_seqlen": self.max_seqlen or None,
            "over_long": self.over_long,
            "seed": self.seed,
            "packing": self.packing,
            "bucket_window": self.bucket_window,
            "look_ahead": self.look_ahead,
            "num_workers": self.planning_workers,
            "planning_ranks": ranks or None,
            "planning_pool": self.planning_pool,
            "timeout_seconds": self.timeout_seconds,
            "plan_options": self.plan_options,
        }

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"config key {name} must be {wanted}, got {getattr(self, name)!r}")

    # ------------------------------------------------------------------ reading and writing

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str) -> TrainConfig:
        """A config of checked keys and types; ``where`` names the origin in errors."""
        kinds = get_type_hints(cls)
        checked = {}
        for key, value in values.items():
            if key not in kinds:
                near = difflib.get_close_matches(str(key), kinds, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{where}: unknown config key {key!r}{hint}")
            checked[key] = _as_kind(value, kinds[key], f"{where}: config key {key}")
        return cls(**checked)

    @classmethod
    def load(
        cls, path: str | Path | None, overrides: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """Read a YAML or JSON file (None: the defaults); ``overrides`` win over it."""
        values = {} if path is None else _read(Path(path))
        return cls.from_mapping({**values, **(overrides or {})}, where=str(path or "options"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the config as JSON, readable by :meth:`load`."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")


def options() -> list[tuple[str, type, Any, str]]:
    """(key, type, default, help) of every config key, in order; a default of None is left open."""
    kinds = get_type_hints(TrainConfig) | dict.fromkeys(PRESETS["inter+PAC"], bool)
    return [(f.name, kinds[f.name], f.default, f.metadata["help"]) for f in fields(TrainConfig)]


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except ImportError:
        raise ValueError(f"{path}: YAML needs the pyyaml package; or write JSON") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not keys and values")
    return values or {}


def _as_kind(value: Any, kind: type, what: str) -> Any:
    """The value in the field's type: an int is a float, YAML's ``3e-3`` text is one too."""
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{what} must be of type {getattr(kind, '__name__', kind)}, got {value!r}")
