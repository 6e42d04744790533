"""The model and the samples that the options name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from dcp.data import TokenDataset, open_chat, open_documents
from dcp.data.records import holds_records, open_records
from dcp.data.tokenizers import Tokenizer, open_tokenizer
from dcp.train.arguments import DataArguments, ModelArguments

# Of an architecture that is made here, where nothing else is said.
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# With these keys a record is more than a plain text.
_OF_CHATS = ("messages", "prompt", "completion", "input_ids")


def tokenizer_of(options: ModelArguments) -> Tokenizer:
    """The tokenizer that the options name, else the model's, else bytes."""
    folder = Path(options.model)
    has_own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return open_tokenizer(options.tokenizer or (options.model if has_own else "bytes"))


def config_of(options: ModelArguments, *, tokenizer: Tokenizer, max_positions: int) -> Any:
    """The configuration of a folder, or of an architecture by its name."""
    overrides = _overrides(options.config_overrides)
    if options.is_folder:
        if overrides:
            raise ValueError(
                f"--config-overrides has no effect on the folder {options.model}: leave it out"
            )
        return AutoConfig.from_pretrained(options.model)
    if options.model not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"--model {options.model!r} is neither a folder here nor an architecture of "
            "transformers, such as llama or qwen3"
        )
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": max_positions}
    like = tokenizer.for_transformers()
    ends = {name: getattr(like, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(options.model, **SMALL | sizes | ends | overrides)
    usual = type(config)()
    if unknown := sorted(name for name in overrides if not hasattr(usual, name)):
        raise ValueError(f"--config-overrides: a {options.model} has no {unknown[0]!r}")
    return config


def has_experts(config: Any) -> bool:
    """Whether a token goes through some of a layer's parameters only."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config.get_text_config(), name, 0) or 0) > 1 for name in names)


def open_model(options: ModelArguments, config: Any) -> PreTrainedModel:
    """The model with its weights, random ones where it has none."""
    has_weights = options.is_folder and any(
        Path(options.model).glob(ending) for ending in ("*.safetensors", "*.bin")
    )
    if not has_weights:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model
    try:
        found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            options.model, config=config, dtype=options.model_dtype
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--model {options.model} cannot be loaded: {error}") from None
    return found


def lora_config(options: ModelArguments) -> Any:
    """What ``peft`` is to make of the model; None without ``lora``."""
    if not options.lora:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("--lora needs the peft package: pip install peft") from None
    names = options.lora_targets
    targets = names if names == "all-linear" else names.split(",")
    return LoraConfig(r=options.lora_rank, target_modules=targets, task_type="CAUSAL_LM")


def open_samples(source: str, options: DataArguments, tokenizer: Tokenizer) -> Any:
    """Texts as tokens; of records with more than a text, samples of :func:`dcp.data.open_chat`."""
    if holds_records(source):
        records = open_records(source, split=options.split)
        if set(_OF_CHATS) & set(next(iter(records), {})):
            records = _some(records, options.max_documents)
            encoder = tokenizer.for_transformers()
            return open_chat(records, encoder, assistant_only=options.assistant_only)
    if options.assistant_only:
        raise ValueError(f"--assistant-only needs messages, and {source!r} has none")
    return open_texts(source, options, tokenizer)


def open_texts(source: str, options: DataArguments, tokenizer: Tokenizer) -> TokenDataset:
    """Texts as tokens."""
    documents = open_documents(
        source,
        text_field=options.text_field,
        split=options.split,
        limit=options.max_documents or None,
    )
    return TokenDataset(documents, tokenizer)


def _some(records: Any, limit: int) -> Any:
    """At most so many records, spread evenly; 0 is all."""
    if not limit or not isinstance(records, Sequence) or limit >= len(records):
        return records
    return [records[i] for i in (np.arange(limit) * len(records) // limit).tolist()]


def _overrides(text: str) -> dict[str, Any]:
    """``a=1,b=[2,3]`` as values."""
    if not text:
        return {}
    given: dict[str, Any] = {}
    for part in text.replace(",", "\n").split("\n"):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--config-overrides must be NAME=VALUE,NAME=VALUE, got {text!r}")
        try:
            given[name.strip()] = json.loads(value)
        except ValueError:
            given[name.strip()] = value
    return given
