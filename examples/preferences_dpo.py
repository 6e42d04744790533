"""Teach a model to prefer one answer to another (DPO), each prompt computed once for both.

    torchrun --nproc-per-node 2 examples/preferences_dpo.py [--model FOLDER --data PAIRS] [--lora]

Without a model, a tiny one with a tokenizer of bytes is made, and pairs for it: nothing is loaded.
The reference is the model as it is at the start; with --lora, the model without its adapters.
"""

import argparse

import torch
import torch.distributed as dist
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from dcp.data import open_preferences
from dcp.integrations.preferences import PreferenceTrainer
from dcp.integrations.trainer import PlanningArguments


def main() -> None:
    options = parse()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else make_tokenizer()
    model = (
        AutoModelForCausalLM.from_pretrained(options.model)
        if options.model
        else make_model(tokenizer)
    )
    pairs = open_preferences(options.data or make_pairs(), tokenizer)
    trainer = PreferenceTrainer(
        model,
        TrainingArguments(
            options.output,
            max_steps=options.steps,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),  # else accelerate would not join the processes
        ),
        train_dataset=pairs,
        processing_class=tokenizer,
        plan=PlanningArguments(tokens_per_batch=4096),
        beta=0.1,
        peft_config=lora() if options.lora else None,
    )
    trainer.train()
    trainer.save_model(f"{options.output}/model")
    if trainer.is_world_process_zero():
        whole = int(pairs.lengths.sum()) + pairs.tokens_saved
        print(f"an epoch has {pairs.tokens_saved} tokens less than the {whole} of separate answers")
    if dist.is_initialized():
        dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument("--data", help="JSON lines or Parquet: prompt, chosen, rejected")
    parser.add_argument("--lora", action="store_true", help="train adapters; needs peft")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", default="runs/preferences")
    return parser.parse_args()


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules="all-linear")


def make_pairs() -> list[dict]:
    """Long and short questions, with a right answer and a wrong one."""
    return [
        {
            "prompt": "Count with me. " * (1 + number % 9) + f"What is {number} + 1?",
            "chosen": f"{number} + 1 = {number + 1}",
            "rejected": f"I think that it may be {number}",
        }
        for number in range(120)
    ]


if __name__ == "__main__":
    main()
