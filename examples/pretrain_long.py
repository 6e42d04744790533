"""Go on pretraining a model on documents longer than it has seen, whole wherever they fit a batch.

    torchrun --nproc-per-node 2 examples/pretrain_long.py [--model FOLDER --data FILES]

Without a model, a tiny one over bytes is made, and trained on this interpreter's own sources.
"""

import argparse
import ast
import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import make_model, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from dcp.data import open_chat
from dcp.integrations.trainer import DCPTrainer, PlanningArguments

LONG = [argparse.__file__, ast.__file__, inspect.__file__]


def main() -> None:
    options = parse()
    set_seed(0)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        config = stretched(AutoConfig.from_pretrained(options.model), options.length)
        model = AutoModelForCausalLM.from_pretrained(options.model, config=config)
    else:
        tokenizer = make_tokenizer()
        config = stretched(make_model(tokenizer).config, options.length)
        model = AutoModelForCausalLM.from_config(config)
    samples = [{"text": Path(path).read_text()} for path in options.data]
    trainer = DCPTrainer(
        model,
        TrainingArguments(
            options.output,
            max_steps=options.steps,
            gradient_checkpointing=True,  # of a layer, its input is all that is kept
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),  # else accelerate would not join the processes
        ),
        train_dataset=open_chat(samples, tokenizer),
        processing_class=tokenizer,
        plan=PlanningArguments(
            tokens_per_batch=options.length,
            loader_options={"over_long": "split"},  # what is longer still goes on in pieces
        ),
    )
    trainer.train()
    trainer.save_model(f"{options.output}/model")
    if dist.is_initialized():
        dist.destroy_process_group()


def stretched(config: Any, length: int) -> Any:
    """The model's rotary embeddings for more tokens than it has seen (YaRN, arXiv 2309.00071)."""
    seen = config.max_position_embeddings
    if length > seen:
        scaling = {"rope_type": "yarn", "factor": length / seen}
        config.rope_parameters = {
            **config.rope_parameters, **scaling, "original_max_position_embeddings": seen
        }  # fmt: skip
        config.max_position_embeddings = length
    return config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument(
        "--data", nargs="+", default=LONG, help="text files (default: long ones of Python's own)"
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens of the longest sequence")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default="runs/pretrain")
    return parser.parse_args()


if __name__ == "__main__":
    main()
