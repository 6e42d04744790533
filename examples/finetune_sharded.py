"""Fine-tune all weights of a chat model of which every rank has a shard (FSDP2).

    torchrun --nproc-per-node 2 examples/finetune_sharded.py [--model FOLDER --data CHATS]

transformers shards the model as it reads it, on GPUs as on CPUs, so that no rank ever holds all of
it; from such training one cannot resume. Where accelerate shards instead, which it does on GPUs
alone, one can: see docs/finetune.md. Without a model, a tiny one is made: nothing is loaded.
"""

import argparse

import torch
import torch.distributed as dist
from finetune_chat import make_chats
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from dcp.data import open_chat
from dcp.integrations.trainer import DCPTrainer, PlanningArguments


def main() -> None:
    options = parse()
    set_seed(0)
    args = TrainingArguments(
        options.output,
        max_steps=options.steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),  # else accelerate would not join the processes
    )
    folder = options.model or make_folder(args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        distributed_config=DistributedConfig(fsdp_size=args.world_size),
    )
    if args.process_index == 0:
        print(f"each rank has {share_of(model):.0%} of the weights")
    trainer = DCPTrainer(
        model,
        args,
        train_dataset=open_chat(options.data or make_chats(), tokenizer, assistant_only=True),
        processing_class=tokenizer,
        plan=PlanningArguments(tokens_per_batch=2048),
    )
    trainer.train()
    trainer.save_model(f"{options.output}/model")  # whole, for from_pretrained
    if dist.is_initialized():
        dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument(
        "--data", help="chats as JSON lines or Parquet: messages, or prompt and completion"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", default="runs/finetune-sharded")
    return parser.parse_args()


def make_folder(args: TrainingArguments) -> str:
    """A tiny model and its tokenizer, written by the first process."""
    folder = f"{args.output_dir}/tiny"
    with args.main_process_first(local=False):
        if args.process_index == 0:
            tokenizer = make_tokenizer()
            tokenizer.save_pretrained(folder)
            make_model(tokenizer).save_pretrained(folder)
    return folder


def share_of(model: torch.nn.Module) -> float:
    """What part of a model's weights is in this process."""
    weights = list(model.parameters())
    here = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    return sum(weight.numel() for weight in here) / sum(weight.numel() for weight in weights)


if __name__ == "__main__":
    main()
