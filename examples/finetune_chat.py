"""Fine-tune a chat model on what its assistant says, by Hugging Face's Trainer.

    torchrun --nproc-per-node 2 examples/finetune_chat.py [--model FOLDER --data CHATS] [--lora]

Without a model, a tiny one with a tokenizer of bytes is made, and chats for it: nothing is loaded.
"""

import argparse

import torch
import torch.distributed as dist
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from dcp.data import open_chat
from dcp.integrations.trainer import DCPTrainer, PlanningArguments


def main() -> None:
    options = parse()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else make_tokenizer()
    model = (
        AutoModelForCausalLM.from_pretrained(options.model)
        if options.model
        else make_model(tokenizer)
    )
    chats = open_chat(options.data or make_chats(), tokenizer, assistant_only=True)
    trainer = DCPTrainer(
        model,
        TrainingArguments(
            options.output,
            max_steps=options.steps,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),  # else accelerate would not join the processes
        ),
        train_dataset=chats,
        processing_class=tokenizer,
        plan=PlanningArguments(tokens_per_batch=2048),
        peft_config=lora() if options.lora else None,
    )
    trainer.train()
    trainer.save_model(f"{options.output}/model")
    if dist.is_initialized():
        dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument(
        "--data", help="chats as JSON lines or Parquet: messages, or prompt and completion"
    )
    parser.add_argument("--lora", action="store_true", help="train adapters; needs peft")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", default="runs/finetune")
    return parser.parse_args()


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules="all-linear")


def make_chats() -> list[dict]:
    """Short and long conversations about sums."""
    return [
        {
            "messages": [
                message
                for turn in range(1, 2 + number % 7)
                for message in (
                    {"role": "user", "content": f"What is {number} + {turn}?"},
                    {"role": "assistant", "content": f"{number} + {turn} = {number + turn}"},
                )
            ]
        }
        for number in range(120)
    ]


if __name__ == "__main__":
    main()
