"""One rank of ``python -m lab trainer``: trains by DCPTrainer, or by plain Trainer on packed rows.

Plain Trainer gets each step's documents as one row a rank, none of them cut, as
``DataCollatorWithFlattening`` makes it. Llama's attention "sdpa" keeps the documents of such a row
apart by a dense mask, made from ``position_ids``; "by_document" computes them one by one, as
flash attention does on a GPU, where no pair outside a document costs time.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dcp.cluster import Cluster
from dcp.data.batching import DOCUMENT
from dcp.data.groups import batches_of
from dcp.integrations.trainer import DCPTrainer, PlanningArguments
from dcp.launch.group import joined_group
from dcp.train.model import SMALL

VOCABULARY = 512
SEED = 0
OURS = "DCPTrainer"
BY_DOCUMENT = "by_document"
PLAIN = {"Trainer": "sdpa", "Trainer, by document": BY_DOCUMENT}  # system: its attention


def config_of(longest: int) -> LlamaConfig:
    return LlamaConfig(**SMALL, vocab_size=VOCABULARY, max_position_embeddings=longest)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The job on this rank, in the group that the environment describes."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate sets torch's threads anew
    with joined_group(torch.device("cpu")):
        return train(job)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train all steps; times, losses and memory of this rank.

    Args:
        job: ``system``; ``steps``, lengths of each step's documents; ``output``, a folder;
            ``cluster``, the file of one for planning.
    """
    set_seed(SEED)
    lengths = np.array([length for step in job["steps"] for length in step])
    step_of = np.repeat(np.arange(len(job["steps"])), [len(step) for step in job["steps"]])
    tokens_per_batch = max(map(sum, job["steps"]))
    rng = np.random.default_rng(SEED)
    samples = [{"input_ids": rng.integers(0, VOCABULARY // 8, length)} for length in lengths]
    model = LlamaForCausalLM(config_of(int(lengths.max())))
    args = TrainingArguments(
        job["output"], max_steps=len(job["steps"]), per_device_train_batch_size=1, use_cpu=True,
        train_sampling_strategy="sequential", learning_rate=1e-3, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=SEED,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    watch = Watch()
    if job["system"] == OURS:
        plan = PlanningArguments(
            tokens_per_batch=tokens_per_batch,
            cluster=Cluster.load(job["cluster"]) if job["cluster"] else None,
            loader_options={"group_ids": step_of},
        )
        trainer: Any = DCPTrainer(model, args, train_dataset=samples, plan=plan, callbacks=[watch])
    else:
        order = batches_of(lengths, step_of, tokens_per_batch=tokens_per_batch, seed=SEED)
        documents = [
            batch[:, DOCUMENT].tolist() for batch in order.epoch(0)
        ]  # DCPTrainer's batches
        rows = [row for batch in documents for row in share_out(batch, lengths, args.world_size)]
        attention = PLAIN[job["system"]]
        model.set_attn_implementation(attention)
        flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=attention == BY_DOCUMENT)
        trainer = Trainer(
            model,
            args,
            train_dataset=[[samples[document] for document in row] for row in rows],
            data_collator=lambda batch: flatten(batch[0]),
            callbacks=[watch],
        )
    trainer.remove_callback(PrinterCallback)
    model.register_forward_pre_hook(watch.note_row, with_kwargs=True)
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "losses": [line["loss"] for line in log],
        "seconds": np.diff(watch.times).tolist(),
        "cpu_seconds": np.diff(watch.cpu_times).tolist(),
        "rows": watch.rows[-len(log) :],  # DCPTrainer tries the model on some more before
        "memory_before_bytes": watch.before_bytes,
        "memory_peak_bytes": most_memory(),
        "plan_wait_seconds": [line.get("plan_wait_seconds", 0.0) for line in log],
        "attention_bytes": [line.get("attention_bytes", 0.0) for line in log],
    }


class Watch(TrainerCallback):
    """Times of the steps' ends, the memory before the first one, tokens of each row."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self.rows: list[int] = []
        self.before_bytes = 0

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self.before_bytes = most_memory()
        self.on_step_end()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        self.times.append(perf_counter())
        self.cpu_times.append(process_time())  # which other jobs of this machine change little

    def note_row(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        self.rows.append(inputs["input_ids"].shape[1])


def most_memory() -> int:
    """The most bytes of this process that were resident so far, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def share_out(
    documents: Sequence[int], lengths: Sequence[int] | np.ndarray, num_ranks: int
) -> list[list[int]]:
    """Whole documents for each rank, the longest first to the rank with the fewest tokens."""
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for document in sorted(documents, key=lambda each: -lengths[each]):
        rank = tokens.index(min(tokens))
        rows[rank].append(int(document))
        tokens[rank] += int(lengths[document])
    return rows


def attention_by_document(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, cu_seq_lens_q: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention of a packed row, ``[1, heads, tokens, head_dim]``, document by document."""
    sizes = cu_seq_lens_q.flatten().diff().tolist()
    parts = zip(*(each.split(sizes, dim=2) for each in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts]
    return torch.cat(found, dim=1), None


AttentionInterface.register(BY_DOCUMENT, attention_by_document)
